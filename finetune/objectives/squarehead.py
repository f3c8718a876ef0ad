"""SquareHead: match a teacher's hidden states by the relative squared error of each layer.

The teacher has the student's architecture. Hidden states grow by orders of magnitude with depth; each error
is divided by the mean square of the teacher's state, so that every block counts the same. The output of the
embeddings is left out, and so is padding. The tokens of prompt and answer count alike.

Formula:
    loss = task CE + kl T^2 KL + squarehead sum_i mean((s_i - t_i)^2) / (mean(t_i^2) + eps)
    s_i, t_i: output of block i of student and teacher; the means are over tokens and features

Paper: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023, arXiv
2310.06927.

Reading: The abstract and the released training script were read, not the body of the paper. The released loss
sums one ratio of means per layer; the means are over the unmasked tokens of the micro-batch.

Differs:
- The released script keeps the zeros of each linear layer in which at least a tenth of the weights are 0.
  Here the zeros that the masks of ``finetune prune`` name stay; other weights that are 0 are trained.
- The last hidden state of a Llama is the one after the final norm, for student and teacher alike.
- The ratio is computed in float32. The released eps is the machine epsilon of bfloat16, 2^-7, so layers whose
  mean square is below about 0.1 count less.

Cost: A forward pass of the teacher for each step, and the hidden states of both models, together 2 * blocks *
n * tokens * width values. The teacher ``base`` needs no memory of its own, unless the method trains weights
in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from ..core.distillation import Distillation
from ..core.objective import PREVIOUS, Need
from ..core.run import Run, Seen
from ..errors import ConfigError
from ..registry import register


@register("squarehead")
@dataclass(frozen=True)
class SquareHead(Distillation):
    """SquareHead: the relative squared error of every block's output, added to the task's loss.

    Options:
        squarehead: Weight of the sum of relative errors.
        kl: Weight of the divergence of the predictions.
        eps: Number added to each mean square by which an error is divided.
    """

    kl: Annotated[float, Ge(0)] = 0.0
    squarehead: Annotated[float, Ge(0)] = 1.0
    eps: Annotated[float, Gt(0)] = 0.0078125

    needs: ClassVar[tuple[Need, ...]] = ("hidden",)
    exact: ClassVar[bool] = False  # a ratio of sums over the micro-batch

    def check(self, run: Run) -> None:
        super().check(run)
        if self.teacher == PREVIOUS:
            return
        ours, theirs = run.model.config, run.reference(self.teacher).model.config
        sizes = []
        for config in (ours, theirs):
            sizes.append(f"{config.num_hidden_layers} layers of width {config.hidden_size}")
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"objective=squarehead compares hidden states, but objective.teacher={self.teacher} has "
                f"{sizes[1]} and the model has {sizes[0]}. Choose a teacher of the same architecture, or "
                "objective=kd."
            )

    def all_weights(self) -> dict[str, float]:
        return super().all_weights() | {"squarehead": self.squarehead}

    def count_term(self, name: str, batch: Any) -> int:
        if name != "squarehead":
            return super().count_term(name, batch)
        mask = batch.inputs.get("attention_mask")
        return len(batch.ids) if mask is None else int(mask.sum())

    def sum_term(self, name: str, seen: Seen, taught: Seen, batch: Any) -> Tensor:
        if name != "squarehead":
            return super().sum_term(name, seen, taught, batch)
        mask = batch.inputs.get("attention_mask")
        found = relative_errors(seen.hidden[1:], taught.hidden[1:], mask, self.eps)
        return found.sum() * self.count_term(name, batch)


def relative_errors(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None, eps: float
) -> Tensor:
    """Return mean((s - t)^2) / (mean(t^2) + eps) of each layer, float32 [layers].

    ``student``, ``teacher``: hidden states, each [n, tokens, width]. ``mask`` [n, tokens] is 0 at padding.
    """
    found = []
    for s, t in zip(student, teacher, strict=True):
        if mask is not None:
            kept = mask.to(s.device) != 0
            s, t = s[kept], t[kept]
        found.append((s.float() - t.float()).square().mean() / (t.float().square().mean() + eps))
    return torch.stack(found)
