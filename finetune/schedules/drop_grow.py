"""The drop-and-grow schedule: the entries that changed least are replaced by others.

Formula:
    before every step t that is a multiple of ``every``: p K entries are dropped, as many others are added
    p = rate (1 - t / steps)                          decay=linear
    p = rate (1 + cos(pi t / steps)) / 2              decay=cosine
    p = rate                                          decay=constant

The entries with the smallest absolute change are dropped, and the best others by score are added.

Paper: SpIEL, Ansell et al., 2024, arXiv 2401.16405, which replaces all entries at the first move (see
method=spiel). Earlier, with the cosine: RigL, Evci et al., 2020, arXiv 1911.11134.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from ..core.sparse.schedule import Dropped, Move, Schedule, Share, period_faults
from ..registry import register


@register("drop_grow")
@dataclass(frozen=True)
class DropGrow(Schedule):
    """Replace a share of the entries every few steps; the share decays to 0 at the end of the run.

    Options:
        every: Number of steps from one move to the next.
        rate: Share of the entries that is replaced, before its decay.
        decay: How the share decays over the run.
        dropped: Whether an entry that leaves returns to its pretrained value (``base``) or keeps its value
            (``kept``).
    """

    every: Annotated[int, Ge(1)] = 50
    rate: Share = 0.2
    decay: Literal["linear", "cosine", "constant"] = "linear"
    dropped: Dropped = "base"

    def replaced(self, step: int, total: int) -> float:
        """Return the share of the entries that is replaced at ``step`` of ``total``."""
        done = step / total
        if self.decay == "linear":
            return self.rate * (1 - done)
        if self.decay == "cosine":
            return self.rate * (0.5 * (1 + math.cos(math.pi * done)))
        return self.rate

    def move(self, step: int, total: int) -> Move | None:
        if step % self.every:
            return None
        return Move(drop=self.replaced(step, total))

    def faults(self, total: int) -> list[str]:
        return period_faults(self.every, total)
