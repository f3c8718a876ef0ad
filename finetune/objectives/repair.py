"""Repair: learn the task while predictions on general data stay those of a frozen model.

The run's data set holds the corrected examples. The stream ``general`` holds data on which the model is to
stay as it was; its labels are not used.

Formula:
    loss = task mean CE(D) + kl T^2 mean KL(p || q) on D_g
    D: the step's examples of the data set; D_g: those of the stream ``general``
    p, q: softmax(logits / T) of teacher and student

Paper: "IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models", FSE 2025,
arXiv 2502.07072. This is its loss; ``selector=irepair`` is its choice of one block in each step.

Reading: The abstract was read, and code of a later study that credits the authors' artefact. The weights 0.5
and 1, and the direction of the divergence, are those of that code.

Differs: The code adds 1e-12 inside the logarithm of the divergence, which here is taken from the logits in
float32. The code scores prompt and continuation; here the data set says what is scored.

Cost: For each step a forward and backward pass over as many general examples, and one forward pass of the
teacher over them. The teacher ``base`` needs no memory of its own, unless the method trains weights in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt
from torch import Tensor

from ..core.distillation import Distillation
from ..core.run import Run, Seen
from ..registry import register

GENERAL = "general"


@register("repair")
@dataclass(frozen=True)
class Repair(Distillation):
    """The task's loss on the data set, and the divergence from a frozen model on a stream of general data.

    Options:
        task: Weight of the task's cross-entropy on the data set.
        kl: Weight of the divergence on ``streams.general``.
    """

    task: Annotated[float, Gt(0)] = 0.5
    kl: Annotated[float, Gt(0)] = 1.0

    def streams(self) -> tuple[str, ...]:
        return (GENERAL,)

    def counts(self, run: Run, batch: Any) -> dict[str, float]:
        name = _name_term(batch)
        return {name: self.count_term(name, batch)}

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        name = _name_term(batch)
        taught = run.reference(self.teacher)(batch) if name == "kl" else seen
        return {name: self.sum_term(name, seen, taught, batch)}


def _name_term(batch: Any) -> str:
    return "kl" if batch.stream == GENERAL else "task"
