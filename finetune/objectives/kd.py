"""Knowledge distillation: match a teacher's predictions in addition to the labels.

Formula:
    loss = task CE(labels) + kl T^2 KL(p || q)
    p, q: softmax(logits / T) of teacher and student; both means are over the scored examples or tokens

Paper: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

Reading: The paper asks for a weighted mean in which the labels weigh considerably less, for the factor T^2,
and for the same T in both softmaxes. It fixes neither T nor the weights. The defaults here are choices of
this project.

Differs: The authors released no code.

Cost: A forward pass of the teacher for each step. The teacher ``base`` needs no memory of its own, unless the
method trains the model's own weights in place. Then the pretrained model is read once and kept in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from ..core.distillation import Distillation
from ..registry import register


@register("kd")
@dataclass(frozen=True)
class KD(Distillation):
    """Knowledge distillation: the divergence from a teacher's predictions, added to the task's loss.

    Options:
        task: Weight of the task's cross-entropy.
        kl: Weight of the divergence.
        temperature: Temperature T of both softmaxes.
    """

    task: Annotated[float, Ge(0)] = 0.5
    kl: Annotated[float, Ge(0)] = 0.5
    temperature: Annotated[float, Gt(0)] = 2.0
