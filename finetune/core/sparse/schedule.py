"""When the trained entries change, and how many they are: one axis of the sparse engine (``core/sparse.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Le

Share = Annotated[float, Gt(0), Le(1)]
Dropped = Literal["base", "kept"]


@dataclass(frozen=True)
class Move:
    """What becomes of the trained entries at one step.

    ``density``: the share of K that is trained afterwards. ``redraw``: all of it is chosen anew by the score. Otherwise at least the share ``drop``
    of the current entries leaves, those with the smallest change or the worst score (``by``); the best untrained ones fill up to ``density``.
    """

    density: float = 1.0
    drop: float = 0.0
    by: Literal["change", "score"] = "change"
    redraw: bool = False


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules. Steps count from 0; the first choice is made before step 0, and a move happens before the step that it is due at.

    ``dropped``: an entry that is no longer trained goes back to its pretrained value (``base``), or stays where it got to (``kept``).
    """

    name: ClassVar[str]

    @property
    def dropped(self) -> Dropped:
        return "base"

    @property
    def dense(self) -> float:
        """The share of the run that trains all entries before any is chosen."""
        return 0.0

    def move(self, step: int, total: int) -> Move | None:
        """What is due before ``step`` (1 to ``total`` - 1), if anything."""
        return None

    def first(self, total: int) -> float:
        """The share of K that is trained from step 0."""
        return 1.0

    def ready(self, step: int, total: int) -> bool:
        """Whether no more than K entries are trained at ``step``."""
        return True

    @property
    def peak(self) -> float:
        """The largest share of K that is ever trained at once."""
        return 1.0

    def faults(self, total: int) -> list[str]:
        """Why this schedule cannot mean anything in a run of ``total`` steps, each as a sentence that names the setting."""
        return []


def never(every: int, total: int) -> list[str]:
    """The fault of a period that does not end within ``total`` steps."""
    return (
        [
            f"schedule.every={every} does not end before the run's {total} steps do, so nothing would ever move; take less."
        ]
        if every >= total
        else []
    )
