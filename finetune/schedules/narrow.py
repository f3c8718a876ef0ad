"""The narrow schedule: drop a part of the trained entries, once in a run.

Formula:
    before step round(at * steps): the best keep * K of the K trained entries by score stay trained

Paper: the progressive adjustment of SaRA, Hu et al., 2025, arXiv 2409.06633. SaRA itself keeps the entries
that are below its threshold instead of a fixed share; see method=sara.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from ..core.sparse.schedule import Dropped, Move, Schedule
from ..registry import register


@register("narrow")
@dataclass(frozen=True)
class Narrow(Schedule):
    """From one step of the run on, train only the best of the trained entries by score.

    Options:
        at: Share of the run after which entries are dropped.
        keep: Share of the entries that stays trained.
        dropped: Whether an entry that leaves returns to its pretrained value (``base``) or keeps its value
            (``kept``).
    """

    at: Annotated[float, Gt(0), Lt(1)] = 0.5
    keep: Annotated[float, Gt(0), Lt(1)] = 0.2
    dropped: Dropped = "kept"

    def move(self, step: int, total: int) -> Move | None:
        if step != round(self.at * total):
            return None
        return Move(density=self.keep, by="score")

    def faults(self, total: int) -> list[str]:
        if 0 < round(self.at * total) < total:
            return []
        return [
            f"schedule.at={self.at:g} of the run's {total} steps is not between the first and the last step; "
            "choose another share."
        ]
