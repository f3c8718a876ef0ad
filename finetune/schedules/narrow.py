"""Narrow the trained set once: SaRA's progressive adjustment (Hu et al., 2025, arXiv 2409.06633)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from ..core.sparse.schedule import Dropped, Move, Schedule
from ..registry import register


@register("narrow")
@dataclass(frozen=True)
class Narrow(Schedule):
    """At the share ``at`` of the run only the best ``keep`` of the entries, by score, go on."""

    at: Annotated[float, Gt(0), Lt(1)] = 0.5
    keep: Annotated[float, Gt(0), Lt(1)] = 0.2
    dropped: Dropped = "kept"

    def move(self, step: int, total: int) -> Move | None:
        return Move(density=self.keep, by="score") if step == round(self.at * total) else None

    def faults(self, total: int) -> list[str]:
        if 0 < round(self.at * total) < total:
            return []
        return [
            f"schedule.at={self.at:g} of the run's {total} steps is no step between the first and the last; "
            "choose another share."
        ]
