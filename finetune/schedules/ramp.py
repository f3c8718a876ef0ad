"""The ramp schedule: the number of trained entries follows a polynomial curve.

Formula:
    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n every))^power
    s: share of the entries that is not trained; t_0: start; n every: length of the ramp; n is rounded down

Paper: Zhu and Gupta, 2017, arXiv 1710.01878, equation 1, which is the curve with power = 3. The masks of the
paper prune weights; here they choose the entries that may differ from the base. Because n is rounded down,
the last update reaches s_f. TensorFlow's code never reaches s_f if ``every`` does not divide the ramp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from ..core.sparse.schedule import Dropped, Move, Schedule, Share, period_faults
from ..registry import register


@register("ramp")
@dataclass(frozen=True)
class Ramp(Schedule):
    """Go from ``initial`` times the budget to the budget, with an update every few steps.

    With ``initial`` above 1, entries are dropped, the worst by score first; below 1, the best are added.

    Options:
        initial: Number of trained entries at the start, as a multiple of the budget.
        power: Exponent of the curve; 3 is the cubic curve of the paper, 1 a straight line.
        start: Share of the run after which the ramp begins.
        end: Share of the run at which the ramp ends.
        every: Number of steps from one update to the next.
        dropped: Whether an entry that leaves returns to its pretrained value (``base``) or keeps its value
            (``kept``).
    """

    initial: Annotated[float, Ge(0)] = 5.0
    power: Annotated[float, Gt(0)] = 3.0
    start: Annotated[float, Ge(0), Lt(1)] = 0.0
    end: Share = 0.5
    every: Annotated[int, Ge(1)] = 10
    dropped: Dropped = "base"

    def initial_density(self, total: int) -> float:
        return self.initial

    @property
    def peak(self) -> float:
        return max(1.0, self.initial)

    def density(self, step: int, total: int) -> float:
        """Return the share of the budget that is trained from ``step`` on; it is constant between updates."""
        begin, updates = round(self.start * total), self._updates(total)
        if not updates:
            return 1.0
        done = min(max((step - begin) // self.every, 0), updates) / updates
        left: float = (1 - done) ** self.power
        return 1 + (self.initial - 1) * left

    def _updates(self, total: int) -> int:
        """Return n; the last update comes before the last step, so that the final budget is trained too."""
        return (min(round(self.end * total), total - 1) - round(self.start * total)) // self.every

    def move(self, step: int, total: int) -> Move | None:
        since = step - round(self.start * total)
        if since % self.every or not 0 < since // self.every <= self._updates(total):
            return None
        return Move(density=self.density(step, total), by="score")

    def is_within_budget(self, step: int, total: int) -> bool:
        return self.density(step, total) <= 1

    def faults(self, total: int) -> list[str]:
        found = period_faults(self.every, total)
        if not found and self._updates(total) < 1:
            found.append(
                f"schedule.start={self.start:g} to schedule.end={self.end:g} of the run's {total} steps is "
                f"less than one schedule.every={self.every}; widen the range or take a smaller period."
            )
        return found
