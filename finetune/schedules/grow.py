"""The grow schedule: entries are added in equal parts, and none is dropped.

Formula:
    n = ceil(round(end * steps) / every) parts; i K / n entries are trained after part i
    part 1 is added before step 0, part i before step (i - 1) * every

Paper: the increments of ID3, Agarwal et al., 2025, arXiv 2408.14470, which adds one part per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..core.sparse.schedule import Move, Schedule, Share, period_faults
from ..registry import register


@register("grow")
@dataclass(frozen=True)
class Grow(Schedule):
    """Reach the budget in equal parts, one every few steps.

    Options:
        every: Number of steps from one part to the next.
        end: Share of the run after which the whole budget is trained.
    """

    every: Annotated[int, Ge(1)] = 1
    end: Share = 1.0

    def parts(self, total: int) -> int:
        """Return how many times entries are added in ``total`` steps."""
        return max(1, -(-round(self.end * total) // self.every))

    def initial_density(self, total: int) -> float:
        return 1 / self.parts(total)

    def move(self, step: int, total: int) -> Move | None:
        part = step // self.every + 1
        if step % self.every or part > self.parts(total):
            return None
        return Move(density=part / self.parts(total))

    def faults(self, total: int) -> list[str]:
        found = period_faults(self.every, total)
        if not found and self.parts(total) < 2:
            found.append(
                f"schedule.every={self.every} is not below schedule.end={self.end:g} times the run's {total} "
                "steps, so no entry would be added after the first part; take less, or a larger share."
            )
        return found
