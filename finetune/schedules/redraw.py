"""All entries are chosen anew from time to time: LIFT's refresh (arXiv 2506.00772), HFT's rounds (arXiv 2404.18466)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..core.sparse.schedule import Dropped, Move, Schedule, period_faults
from ..registry import register


@register("redraw")
@dataclass(frozen=True)
class Redraw(Schedule):
    """Every ``every`` steps the score chooses among all entries again; those that stay keep value and moments."""

    every: Annotated[int, Ge(1)] = 200
    dropped: Dropped = "kept"

    def move(self, step: int, total: int) -> Move | None:
        return Move(redraw=True) if step % self.every == 0 else None

    def faults(self, total: int) -> list[str]:
        return period_faults(self.every, total)
