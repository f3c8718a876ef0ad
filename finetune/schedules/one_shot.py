"""The one-shot schedule: train all entries, choose once, rewind, and train the chosen entries.

Formula:
    the first round(dense * steps) steps train every entry; the rest of the run trains K entries

Paper: LT-SFT, Ansell et al., 2022, arXiv 2110.07560. The weights are rewound to the pretrained ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Lt

from ..core.method import LRSchedule
from ..core.sparse.schedule import Schedule
from ..registry import register


@register("one_shot")
@dataclass(frozen=True)
class OneShot(Schedule):
    """Train all entries for a part of the run, choose, rewind to the pretrained weights, train the chosen.

    Options:
        dense: Share of the run that trains all entries.
        lr_schedule: Whether the learning rate's schedule and its warm-up start again in each phase
            (``restart``) or run once over the whole run (``span``).
    """

    dense: Annotated[float, Gt(0), Lt(1)] = 0.25
    lr_schedule: LRSchedule = "restart"

    def faults(self, total: int) -> list[str]:
        if 0 < round(self.dense * total) < total:
            return []
        return [
            f"schedule.dense={self.dense:g} of the run's {total} steps leaves no step for one of the two "
            "phases; choose another share."
        ]
