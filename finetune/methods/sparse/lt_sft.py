"""LT-SFT: train all entries, keep those that moved most, rewind, and train these.

The first phase trains every entry of the chosen layers and the head, for the share ``schedule.dense`` of the
run. The K entries of the model with the largest change are chosen. Then everything, the head included,
returns to where it started, and the second phase trains the chosen entries with a new optimizer. The learning
rate's schedule, warm-up included, runs over each phase anew; ``schedule.lr_schedule=span`` runs it once over
the whole run. Exactly K entries are trained; ties go to the lower position.

Formula:
    chosen: the K largest |w - w_0| of the model, w the weight after the dense phase
    loss = task loss + l1 sum|change| / N        N: parameters of the model; in the second phase only

Paper: Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv 2110.07560.

Reading: The abstract and the released code were read, the body of the paper could not be. The released
scripts use l1 = 0.1 for languages and 0 for tasks. The default of 0.25 for ``schedule.dense`` is a choice of
this project; the released scripts give the first phase about a quarter to a half of the epochs.

Differs:
- One round of choosing; the released code can repeat the phases and free a part of K in each.
- The linear layers only; the released code also counts word embeddings and biases.
- The released code frees the whole model if fewer than K entries moved.
- The released penalty has no gradient, by a fault, and is meant for both phases.
- The released diff drops changes of at most 1e-7.

Cost: The first phase needs a gradient and two moments in Adam for every entry of the layers, the second K of
each. K values and positions are stored.
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
    """LT-SFT: the entries that a dense phase moved most, rewound and trained.

    Options:
        l1: Factor of the sum of absolute changes, divided by the number of the model's parameters, in the
            loss of the second phase.
    """

    score: ScoreName = "change"
    scope: Scope = "model"
    schedule: Schedule = OneShot()
    l1: Annotated[float, Ge(0)] = 0.0

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the entries that a phase of training all of them moved most"
    paper: ClassVar[str] = "arXiv 2110.07560"

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        if not self.l1:
            return 0.0
        values: Tensor = state["bank"].values
        size: int = sum(parameter.numel() for parameter in run.model.parameters())
        return self.l1 * values.abs().sum() / size
