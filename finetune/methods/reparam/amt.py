"""AMT and R-AMT: switch off a few weights, learned through real-valued scores (2023, arXiv 2307.15049).

Read from the released code. W becomes m W with m = 1 where a score is above ``threshold``, else 0; the gradient passes the step unchanged,
dL/ds = dL/d(m W) * W. All scores start at ``initial``, so all weights are on. ``penalty`` times the sum of the scores' norms is added to the loss.
With Adam only the ratio of initial - threshold to the rate counts: a score that is always pushed down gets there in (initial - threshold) / lr
steps. Weight decay leaves the scores alone: it would in time switch off everything.

``gdr`` is the strength l of R-AMT's gradient dropout, 0 being plain AMT. With a and b the gradients of the loss and of the cross-entropy to the
untouched weights' predictions (at ``temperature``), an element whose signs differ becomes (1 - l) a with the probability |b| / (|a| + |b|), as in the
code; the paper's figure has the complement. Elements of one sign stay as they are. The code's 1e-8 under the fraction is left out: gradients of means
can be that small. The price is a forward and a backward pass, in eval mode, and the teacher's forward pass.

The paper's classes are text features of CLIP, which teacher and student share and nothing trains. There is no such thing here: a new head is trained
as ever, and the teacher, pretrained but for it, predicts through it as it is by then. In a language model every token is a sample. The code masks
the convolution of the patch embedding too, which is no linear layer here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.method import Reparam, Run
from ...core.part import Delta, Kept, WeightGrad, base
from ...core.site import Site
from ...errors import ConfigError
from ...registry import register


class Mask(Delta):
    """(m - 1) W, where ``scores`` [out, in], float32, are above the threshold (m = 1) or not (m = 0); they learn as if m were the scores."""

    decays = False

    def __init__(self, shape: tuple[int, int], initial: float, threshold: float) -> None:
        super().__init__()
        self.initial, self.threshold = initial, threshold
        self.scores = nn.Parameter(torch.full(shape, initial))

    def off(self) -> Tensor:
        """Where the weight is masked, [out, in] bool."""
        return ~(self.scores.detach() > self.threshold)

    def describe(self) -> str:
        return "a mask of weights"

    def forward(self, weight: Tensor) -> Tensor:
        through = self.scores - self.scores.detach()  # zero, with the gradient of the scores
        return (through - self.off().to(through.dtype)) * weight

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, gate: float, kept: Kept = ()) -> Kept:
        weight.sub_(original.where(self.off(), 0), alpha=gate)
        return ()

    @torch.no_grad()
    def pull(self, grad: WeightGrad, original: Tensor, gate: float, kept: Kept) -> tuple[Tensor | None, ...]:
        return (grad.dense.mul(original).mul_(gate),)

    def pack(self) -> dict[str, Tensor]:
        """What is stored of a finished run: a bit a weight, the first in the highest place of a byte."""
        import numpy as np

        return {"on": torch.from_numpy(np.packbits(~self.off().cpu().numpy()))}

    @torch.no_grad()
    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Take over a mask; the scores become ones that give it. Raises ``ConfigError`` where it does not fit."""
        import numpy as np

        bits, count = stored["on"], self.scores.numel()
        if bits.numel() != math.ceil(count / 8):
            raise ConfigError(
                f"the stored mask of {bits.numel()} bytes does not fit a weight of {count} entries."
            )
        on = (
            torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count))
            .view(self.scores.shape)
            .to(self.scores)
        )
        self.scores.copy_(2 * self.threshold - self.initial + on * 2 * (self.initial - self.threshold))


def damped(a: Tensor, b: Tensor, strength: float, uniform: Tensor) -> Tensor:
    """``a``, less ``strength`` of it where the sign of ``b`` differs and ``uniform`` in [0, 1) is at least |a| / (|a| + |b|)."""
    size = a.abs()
    dropped = (a.sign() * b.sign() < 0) & (uniform * (size + b.abs()) >= size)
    return a.where(~dropped, a * (1 - strength))


def _masks(state: nn.Module) -> list[Mask]:
    return [m for m in state.modules() if isinstance(m, Mask)]


@register("amt")
@dataclass(frozen=True)
class AMT(Reparam):
    """AMT: binary masks on the attention weights, learned through scores; R-AMT where the pretrained model gates their gradients."""

    targets: tuple[str, ...] = ("attention",)
    initial: float = 1e-2
    threshold: float = 5e-3
    penalty: Annotated[float, Ge(0)] = 1e-4
    gdr: Annotated[float, Ge(0), Le(1)] = 1.0
    temperature: Annotated[float, Gt(0)] = 1.0

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "a score a weight, which switches it on or off"
    paper: ClassVar[str] = "arXiv 2307.15049"

    def __post_init__(self) -> None:
        if self.initial <= self.threshold:
            raise ValueError(
                f"method.initial={self.initial:g} is not above method.threshold={self.threshold:g}: all would start masked; raise it."
            )

    def delta(self, site: Site) -> Mask:
        return Mask(site.shape, self.initial, self.threshold)

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        return (
            self.penalty * torch.stack([m.scores.norm() for m in _masks(state)]).sum()
            if self.penalty
            else 0.0
        )

    def after_backward(self, run: Run, state: Any) -> None:
        trained = [m.scores for m in _masks(state) if m.scores.requires_grad]  # a selector may let some rest
        if not self.gdr or not trained:
            return
        seed = int(
            torch.randint(2**62, (), generator=run.generator)
        )  # one for all processes, and the numbers are drawn where they are needed
        generator = torch.Generator(trained[0].device).manual_seed(seed)
        for scores, b in zip(trained, self.distilled(run, state, trained), strict=True):
            if scores.grad is not None:
                uniform = torch.rand(b.shape, generator=generator, device=b.device)
                scores.grad = damped(scores.grad, b, self.gdr, uniform)

    def distilled(self, run: Run, state: Any, trained: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the mean cross-entropy to the predictions of the untouched weights, over all of the step's examples or tokens."""
        sums, counted = [torch.zeros_like(t) for t in trained], 0
        scaler = getattr(
            run.optimizer, "scaler", None
        )  # in fp16 the gradients at hand are scaled, so these must be
        for batch in [b for b in run.batch if b is not None]:
            with base(state), torch.no_grad():
                wanted = F.softmax(run.logits(batch) / self.temperature, -1)
            given = F.log_softmax(run.logits(batch) / self.temperature, -1)
            loss = -(wanted * given).sum() * (self.temperature**2 / max(1, len(wanted)))
            grads = torch.autograd.grad(scaler.scale(loss) if scaler else loss, trained, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total.add_(grad, alpha=len(wanted))
            counted += len(wanted)
        mean = run.agree(torch.tensor(float(counted), device=sums[0].device))
        return [run.agree(total) / mean for total in sums]

    def after_step(self, run: Run, state: Any) -> None:
        offs = [m.off() for m in _masks(state)]
        run.log(masked=float(torch.stack([o.sum() for o in offs]).sum()) / sum(o.numel() for o in offs))
