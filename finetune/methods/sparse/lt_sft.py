"""LT-SFT: train all, keep where it moved most, rewind, train that (Ansell et al., 2022, arXiv 2110.07560).

The first phase trains every entry of the sites (the share ``schedule.dense`` of the run) and the head; the K entries of the model with the largest
change are chosen, all of it goes back to where it started, the head too, and the second phase trains the chosen with a new optimizer. Exactly K, ties
to the lower position; the released code frees the whole model if fewer than K entries moved. One round; the linear layers only, where the released
code also counts word embeddings and biases. ``l1``: the weight of the sum of absolute changes over the model's size in the loss, in the second phase
(0.1 for languages, 0 for tasks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import Tensor

from ...core.method import Run
from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import Scope, ScoreName
from ...registry import register
from ...schedules.one_shot import OneShot


@register("lt_sft")
@dataclass(frozen=True)
class LTSFT(Sparse):
    """LT-SFT: the entries that a dense phase moved most, rewound and trained."""

    score: ScoreName = "change"
    scope: Scope = "model"
    schedule: Schedule = OneShot()
    l1: Annotated[float, Ge(0)] = 0.0

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the entries that a phase of training all of them moved most"
    paper: ClassVar[str] = "arXiv 2110.07560"

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        values: Tensor = state["bank"].values
        return (
            self.l1 * values.abs().sum() / sum(p.numel() for p in run.model.parameters()) if self.l1 else 0.0
        )
