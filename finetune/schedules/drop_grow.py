"""Drop the entries that changed least, grow others: SpIEL (Ansell et al., 2024, arXiv 2401.16405), and RigL before it (arXiv 1911.11134)."""

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
    """Every ``every`` steps the share ``rate`` of the entries is replaced; the share decays to 0 at the end of the run."""

    every: Annotated[int, Ge(1)] = 50
    rate: Share = 0.2
    decay: Literal["linear", "cosine", "constant"] = "linear"
    dropped: Dropped = "base"

    def replaced(self, step: int, total: int) -> float:
        """The share that is replaced at ``step``."""
        done = step / total
        return (
            self.rate
            * {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[
                self.decay
            ]
        )

    def move(self, step: int, total: int) -> Move | None:
        return Move(drop=self.replaced(step, total)) if step % self.every == 0 else None

    def faults(self, total: int) -> list[str]:
        return period_faults(self.every, total)
