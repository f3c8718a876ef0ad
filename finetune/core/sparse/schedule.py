"""Schedules of the sparse engine: when the trained entries change, and how many are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Le

from ..method import LRSchedule

Share = Annotated[float, Gt(0), Le(1)]
Dropped = Literal["base", "kept"]


@dataclass(frozen=True)
class Move:
    """A change of the trained entries before one step.

    ``density``: the share of the budget K that is trained afterwards. ``redraw``: all entries are chosen
    again by score. Otherwise at least the share ``drop`` of the trained entries is dropped: those with the
    smallest change, or the worst score (``by``). The best other entries then fill up to ``density``.
    """

    density: float = 1.0
    drop: float = 0.0
    by: Literal["change", "score"] = "change"
    redraw: bool = False


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules. Steps count from 0 within a phase, and ``total`` is the phase's number of steps.

    The first choice is made before step 0, and a move before the step for which ``move`` returns it.
    """

    KIND: ClassVar[str] = "schedule"
    name: ClassVar[str]

    @property
    def dropped(self) -> Dropped:
        """Return what becomes of an entry that is no longer trained.

        ``base``: it returns to its pretrained value. ``kept``: it keeps the value that it has.
        """
        return "base"

    @property
    def dense(self) -> float:
        """Return the share of the run that trains all entries before the first choice."""
        return 0.0

    @property
    def lr_schedule(self) -> LRSchedule:
        """Return whether the learning rate's schedule restarts after the dense phase or spans the run."""
        return "span"

    @property
    def peak(self) -> float:
        """Return the largest share of the budget that is ever trained at once."""
        return 1.0

    def initial_density(self, total: int) -> float:
        """Return the share of the budget that is trained from step 0."""
        return 1.0

    def move(self, step: int, total: int) -> Move | None:
        """Return the move that is due before ``step`` (1 to ``total`` - 1), or None."""
        return None

    def is_within_budget(self, step: int, total: int) -> bool:
        """Tell whether no more entries than the budget are trained at ``step``."""
        return True

    def faults(self, total: int) -> list[str]:
        """Return one sentence, naming the setting, for each setting without effect in ``total`` steps."""
        return []


def period_faults(every: int, total: int) -> list[str]:
    """Return a fault if the period ``every`` does not end within ``total`` steps."""
    if every < total:
        return []
    return [
        f"schedule.every={every} is not below the run's {total} steps, so no entry would ever move; take "
        "less."
    ]
