"""Chosen once, after a dense phase, and rewound (LT-SFT: Ansell et al., 2022, arXiv 2110.07560)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from ..core.sparse.schedule import Schedule
from ..registry import register


@register("one_shot")
@dataclass(frozen=True)
class OneShot(Schedule):
    """Train every entry for the share ``dense`` of the run, choose, rewind to the pretrained weights, train the chosen."""

    dense: Annotated[float, Gt(0), Lt(1)] = 0.25

    def faults(self, total: int) -> list[str]:
        if 0 < round(self.dense * total) < total:
            return []
        return [
            f"schedule.dense={self.dense:g} of the run's {total} steps leaves no step for one of the two "
            "phases; choose another share."
        ]
