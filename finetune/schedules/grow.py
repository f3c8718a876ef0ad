"""Entries are added a few at a time and stay: ID3 (Agarwal et al., 2025, arXiv 2408.14470)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..core.sparse.schedule import Move, Schedule, Share, period_faults
from ..registry import register


@register("grow")
@dataclass(frozen=True)
class Grow(Schedule):
    """K is reached in equal parts, the first before step 0, then every ``every`` steps until the share ``end`` of the run."""

    every: Annotated[int, Ge(1)] = 1
    end: Share = 1.0

    def parts(self, total: int) -> int:
        """How many times entries are added."""
        return max(1, -(-round(self.end * total) // self.every))

    def first(self, total: int) -> float:
        return 1 / self.parts(total)

    def move(self, step: int, total: int) -> Move | None:
        done = step // self.every + 1
        return (
            Move(density=done / self.parts(total))
            if step % self.every == 0 and done <= self.parts(total)
            else None
        )

    def faults(self, total: int) -> list[str]:
        found = period_faults(self.every, total)
        if not found and self.parts(total) < 2:
            found.append(
                f"schedule.every={self.every} is no less than the share schedule.end={self.end:g} of the "
                f"run's {total} steps, so nothing would grow; take less, or a larger share."
            )
        return found
