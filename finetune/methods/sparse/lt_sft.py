"""LT-SFT: train all entries, choose those that moved most, rewind, and train only these.

The first phase trains every entry of the chosen layers and the head, for the share ``schedule.dense`` of the
run. The K entries of the model with the largest change are chosen. Then everything, the head included,
returns to where it started, and the second phase trains the chosen entries with a new optimizer. The learning
rate's schedule and its warm-up start again in each phase; with ``schedule.lr_schedule=span`` they run once
over the whole run. Exactly K entries are trained; ties go to the lower position.

Formula:
    chosen: the K largest |w - w_0| of the model, w the weight after the dense phase
    loss = task loss + l1 sum|w - w_0| / N       N: parameters of the model; sum over the trained entries of
                                                 the layers, in both phases

Paper: Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv 2110.07560.

Reading: The abstract and the released code were read; the body of the paper was not available. The released
scripts use l1 = 0.1 for languages and 0 for tasks, in both phases. The default of 0.25 for ``schedule.dense``
is a choice of this project; the released scripts give the first phase about a quarter to a half of the
epochs.

Rate: The released scripts have 5e-5, linear, in both phases, and 2e-5 for natural language inference. The
rate of the paper is unverified.

Differs:
- The phases run once; the released code can repeat them and choose a part of K in each round.
- Only linear layers are trained; the released code also counts word embeddings and biases.
- If fewer than K entries moved, the released code trains the whole model.
- By mistake, the released penalty has no gradient: its value is logged, and training is the same at any
  factor. Here it has a gradient. The released sum includes the head; here it does not.
- The released code does not store changes of at most 1e-7.

Cost: The first phase needs a gradient and two moments in Adam for every entry of the layers, and with a
penalty a copy of their weights; the second phase needs K of each. K values and positions are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ...core.inplace import InPlace
from ...core.method import Phase, Run
from ...core.site import find_sites
from ...core.sparse.engine import Dense, Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import Scope, ScoreName
from ...registry import register
from ...schedules.one_shot import OneShot


@register("lt_sft")
@dataclass(frozen=True)
class LTSFT(Sparse):
    """LT-SFT: the entries that moved most in a dense phase, rewound and trained.

    Options:
        l1: Factor of the sum of absolute changes, divided by the number of the model's parameters, in the
            loss of the second phase.
        l1_dense: The same factor in the dense phase; ``null`` takes the value of ``l1``.
    """

    score: ScoreName = "change"
    scope: Scope = "model"
    schedule: Schedule = OneShot()
    l1: Annotated[float, Ge(0)] = 0.0
    l1_dense: Annotated[float, Ge(0)] | None = None

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the entries that moved most while all of them were trained"
    paper: ClassVar[str] = "arXiv 2110.07560"

    def contradictions(self) -> list[str]:
        found = super().contradictions()
        if self.l1_dense and not self.schedule.dense:
            found.append(
                f"method.l1_dense={self.l1_dense:g} has no effect with schedule={self.schedule.name}, which "
                "has no dense phase. Take schedule=one_shot."
            )
        return found

    def phases(self) -> tuple[Phase, ...]:
        *dense, chosen = super().phases()
        l1 = self.l1 if self.l1_dense is None else self.l1_dense
        if l1:
            dense = [replace(phase, method=PenalizedDense(targets=self.targets, l1=l1)) for phase in dense]
        return *dense, chosen

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        if not self.l1:
            return 0.0
        values: Tensor = state["bank"].values
        return self.l1 * values.abs().sum() / count_parameters(run.model)


@dataclass(frozen=True)
class PenalizedDense(Dense):
    """The dense phase with a penalty on the absolute changes of all entries.

    Options:
        l1: Factor of the sum of absolute changes, divided by the number of the model's parameters.
    """

    l1: Annotated[float, Ge(0)] = 0.0

    def build(self, model: nn.Module) -> InPlace:
        names = [f"{site.name}.weight" for site in find_sites(model, self.targets)]
        return InPlace(model, names, keep=True)

    def loss(self, run: Run, state: InPlace, batch: Any) -> Tensor:
        total = torch.zeros((), device=next(state.parameters()).device)
        for name, weight in state.trained().items():
            total = total + (weight - state.original(name)).abs().sum()
        return self.l1 * total / count_parameters(run.model)


def count_parameters(model: nn.Module) -> int:
    """Count the values of all parameters of the model, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())
