"""The redraw schedule: all entries are chosen again from time to time.

Formula:
    before every step that is a multiple of ``every``: choose the best K of all entries by score

Paper: LIFT's refresh of the mask, Liu et al., 2025, arXiv 2506.00772.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..core.sparse.schedule import Dropped, Move, Schedule, period_faults
from ..registry import register


@register("redraw")
@dataclass(frozen=True)
class Redraw(Schedule):
    """Choose among all entries again every few steps; entries that stay keep their values and moments.

    Options:
        every: Number of steps from one choice to the next.
        dropped: Whether an entry that leaves returns to its pretrained value (``base``) or keeps its value
            (``kept``).
    """

    every: Annotated[int, Ge(1)] = 200
    dropped: Dropped = "kept"

    def move(self, step: int, total: int) -> Move | None:
        if step % self.every:
            return None
        return Move(redraw=True)

    def faults(self, total: int) -> list[str]:
        return period_faults(self.every, total)
