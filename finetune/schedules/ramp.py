"""The number of trained entries follows a curve (Zhu and Gupta, 2017, arXiv 1710.01878, equation 1: the cubic one).

Between sparsities s_i and s_f, with n steps of length ``every`` from t_0:  s_t = s_f + (s_i - s_f) (1 - (t -
t_0) / (n every))^power. The paper's masks prune weights; here they say which entries may differ from the
base. n is rounded down, so that s_f is reached at an update, which the TensorFlow code misses where the
interval does not divide the ramp.
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
    """From ``start`` to ``end`` (shares of the run) the trained entries go from ``initial`` times K to K, every ``every`` steps.

    ``initial`` above 1: entries are given up, the worst by score first; below 1: the best are added.
    ``power`` 3 is the cubic curve, 1 a line.
    """

    initial: Annotated[float, Ge(0)] = 5.0
    power: Annotated[float, Gt(0)] = 3.0
    start: Annotated[float, Ge(0), Lt(1)] = 0.0
    end: Share = 0.5
    every: Annotated[int, Ge(1)] = 10
    dropped: Dropped = "base"

    def first(self, total: int) -> float:
        return self.initial

    @property
    def peak(self) -> float:
        return max(1.0, self.initial)

    def density(self, step: int, total: int) -> float:
        """The share of K trained from ``step`` on, constant between updates."""
        begin, updates = round(self.start * total), self._updates(total)
        if not updates:
            return 1.0
        done = min(max((step - begin) // self.every, 0), updates) / updates
        left: float = (1 - done) ** self.power
        return 1 + (self.initial - 1) * left

    def _updates(self, total: int) -> int:
        """n; the last update comes before the last step, so that K is met and then trained."""
        return (min(round(self.end * total), total - 1) - round(self.start * total)) // self.every

    def move(self, step: int, total: int) -> Move | None:
        since = step - round(self.start * total)
        due = since % self.every == 0 and 0 < since // self.every <= self._updates(total)
        return Move(density=self.density(step, total), by="score") if due else None

    def ready(self, step: int, total: int) -> bool:
        return self.density(step, total) <= 1

    def faults(self, total: int) -> list[str]:
        found = period_faults(self.every, total)
        if not found and self._updates(total) < 1:
            found.append(
                f"schedule.start={self.start:g} to schedule.end={self.end:g} of the run's {total} steps is "
                f"less than one schedule.every={self.every}; widen the range or take a smaller period."
            )
        return found
