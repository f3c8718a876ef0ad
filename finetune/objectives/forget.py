"""Gradient-ascent unlearning: raise the loss on data to forget, and lower it on data to retain.

The model is to forget the run's data set, and to retain the stream ``retain``.

Formula:
    loss = -forget mean CE(D_f) + retain mean CE(D_r)
    D_f: the step's examples of the data set; D_r: those of the stream ``retain``

Paper: "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, arXiv 2304.04934, for ascent alone;
"Efficient Machine Unlearning via Influence Approximation", 2025, arXiv 2507.23257, for the two terms.

Reading: The abstracts and the released code were read, not the bodies of the papers. The weights 1 and 1 are
those of the second paper's code, which takes the difference of the two means. The weights in its text are
unverified. Ascent alone, ``objective.retain=0``, is the baseline GA of the first paper's code.

Differs:
- The code of the second paper takes a single step of a new Adam over both complete sets; such a step depends
  only on the signs of the gradient. Here every step takes a batch of each.
- The code of the first paper runs 5 epochs of ascent at a rate of 1e-4 in its example.
- Cross-entropy has no upper bound, so the loss has no lower bound: only the number of steps and the learning
  rate limit it.
- There is no term for the divergence from the original model on the retained examples.

Cost: In every step, a forward and backward pass over as many retained examples as forgotten ones. With
``objective.retain=0`` there is no second stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt
from torch import Tensor

from ..core.loss import count, example_losses
from ..core.objective import Objective
from ..core.run import Run, Seen
from ..registry import register

RETAIN = "retain"


@register("forget")
@dataclass(frozen=True)
class Forget(Objective):
    """Gradient-ascent unlearning: minus the cross-entropy on the data set, plus that on data to retain.

    Options:
        forget: Weight of the ascent on the data set.
        retain: Weight of the cross-entropy on ``streams.retain``; at 0 there is no such stream.
    """

    forget: Annotated[float, Gt(0)] = 1.0
    retain: Annotated[float, Ge(0)] = 1.0

    keeps_best: ClassVar[bool] = False  # validation measures the data to forget

    def streams(self) -> tuple[str, ...]:
        return (RETAIN,) if self.retain else ()

    def weights(self, run: Run) -> dict[str, float]:
        return {"forget": -self.forget, RETAIN: self.retain}

    def counts(self, run: Run, batch: Any) -> dict[str, float]:
        return {_name_term(batch): count(batch.labels)}

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        losses = example_losses(seen.logits, batch.labels.to(seen.logits.device))
        return {_name_term(batch): losses.sum()}


def _name_term(batch: Any) -> str:
    return RETAIN if batch.stream == RETAIN else "forget"
