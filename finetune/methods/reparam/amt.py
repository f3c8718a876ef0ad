"""AMT and R-AMT: switch off a few weights, chosen by trained scores.

Every weight of the chosen layers has a score, which starts at ``initial``. A weight is on while its score is
above ``threshold``, so all are on at step 0. The backward pass treats the step function as the identity, so
the scores get a gradient. ``penalty`` times the sum of the norms of the scores is added to the loss. Weight
decay does not act on the scores, because it would eventually switch off every weight.

R-AMT is AMT with gradient dropout of strength ``gdr``; 0 is plain AMT. Every step computes a second gradient
b, that of the cross-entropy to the predictions of the pretrained weights (the teacher). Where b and the
gradient a of the loss differ in sign, a is damped with a probability that grows with the share of b.

Formula:
    W' = m W,  m = 1 where s > threshold, else 0        s: [out, in], the scores
    dL/ds = dL/d(m W) * W
    a' = (1 - gdr) a  with probability |b| / (|a| + |b|)  where sign(a) and sign(b) differ, else a' = a
    b: gradient of -temperature^2 mean(sum(p log q))
    p, q: softmax(logits / temperature) of teacher and student

With Adam only the ratio of ``initial`` - ``threshold`` to the learning rate matters: a score that is always
pushed down reaches the threshold after (initial - threshold) / lr steps. A shorter run masks nothing.

Paper: "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models", ICCV
2023, arXiv 2307.15049.

Reading: The abstract, the project page and the released code were read, but not the text of the paper. The
probability is that of the code; a figure of the paper shows its complement. ``initial``, ``threshold``,
``penalty`` and ``gdr`` are those of the released configurations; the documentation there also names gdr = 0.3
for some data sets. The file of ``method=amt``, ``conf/method/amt.yaml``, sets a higher ``initial`` and
``threshold`` and a higher learning rate, and explains why.

Rate: The released configurations have 8e-5 over 30 epochs, and 3e-5 over 10 for ImageNet. The rate of the
paper is unverified.

Differs:
- The paper's classes are text features of CLIP, which teacher and student share and which are never trained.
  Here a new head is trained, and the teacher is the pretrained body with the current head. In a language
  model every token is a sample.
- The code adds 1e-8 to the denominator of the probability. It is left out here, because gradients of means
  can be that small.
- The code also masks the convolution of the patch embedding, which is not a linear layer here.
- The code never calls backward when gradient dropout is off; here gdr=0 trains plain AMT.

Cost: One score per weight, its gradient and two moments in Adam. One bit per weight is stored. Gradient
dropout costs a forward and a backward pass in eval mode, and a forward pass of the teacher.
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

from ...core.loss import scored
from ...core.method import Reparam, Run
from ...core.part import Cache, Delta, WeightGrad
from ...core.site import Site
from ...errors import ConfigError
from ...registry import register


class Mask(Delta):
    """The change (m - 1) W; m is 1 where ``scores`` [out, in] float32 are above the threshold, else 0.

    The scores get the gradient of m.
    """

    decays = False

    def __init__(self, shape: tuple[int, int], initial: float, threshold: float) -> None:
        super().__init__()
        self.initial, self.threshold = initial, threshold
        self.scores = nn.Parameter(torch.full(shape, initial))

    def off(self) -> Tensor:
        """Return which weights are switched off, [out, in] bool."""
        return ~(self.scores.detach() > self.threshold)

    def describe(self) -> str:
        return "a mask of weights"

    def forward(self, weight: Tensor) -> Tensor:
        straight_through = self.scores - self.scores.detach()  # 0, with the gradient of the scores
        return (straight_through - self.off().to(straight_through.dtype)) * weight

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, gate: float, cache: Cache = ()) -> Cache:
        weight.sub_(original.where(self.off(), 0), alpha=gate)
        return ()

    @torch.no_grad()
    def pull(
        self, grad: WeightGrad, original: Tensor, gate: float, cache: Cache
    ) -> tuple[Tensor | None, ...]:
        return (grad.dense.mul(original).mul_(gate),)

    def pack(self) -> dict[str, Tensor]:
        """Return what a finished run stores: one bit per weight, the first weight in a byte's highest bit."""
        import numpy as np

        return {"on": torch.from_numpy(np.packbits(~self.off().cpu().numpy()))}

    @torch.no_grad()
    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Load a stored mask: set scores that produce it. Raises ``ConfigError`` if it does not fit."""
        import numpy as np

        bits, count = stored["on"], self.scores.numel()
        if bits.numel() != math.ceil(count / 8):
            raise ConfigError(
                f"The stored mask has {bits.numel()} bytes, which do not fit a weight of {count} entries."
            )
        flat = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count))
        on = flat.view(self.scores.shape).to(self.scores)
        self.scores.copy_(2 * self.threshold - self.initial + on * 2 * (self.initial - self.threshold))


def damp(a: Tensor, b: Tensor, strength: float, uniform: Tensor) -> Tensor:
    """Return gradient ``a``, damped at random to (1 - strength) a where ``b`` has the opposite sign.

    An entry is damped where ``uniform``, drawn from [0, 1), is at least |a| / (|a| + |b|). All tensors have
    one shape.
    """
    size = a.abs()
    dropped = (a.sign() * b.sign() < 0) & (uniform * (size + b.abs()) >= size)
    return a.where(~dropped, a * (1 - strength))


def find_masks(state: nn.Module) -> list[Mask]:
    """Return all masks of a state."""
    return [module for module in state.modules() if isinstance(module, Mask)]


@register("amt")
@dataclass(frozen=True)
class AMT(Reparam):
    """AMT: binary masks on the attention weights, learned through scores; R-AMT with gradient dropout.

    Options:
        targets: Layers whose weights are masked; the paper masks attention.
        initial: Score of every weight at the start.
        threshold: A weight is on while its score is above this.
        penalty: Factor of the sum of the norms of the scores, which is added to the loss.
        gdr: Strength of the gradient dropout; 0 is plain AMT.
        temperature: Temperature of the softmax of teacher and student.
    """

    targets: tuple[str, ...] = ("attention",)
    initial: float = 1e-2
    threshold: float = 5e-3
    penalty: Annotated[float, Ge(0)] = 1e-4
    gdr: Annotated[float, Ge(0), Le(1)] = 1.0
    temperature: Annotated[float, Gt(0)] = 1.0

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "a score per weight, which switches it on or off"
    paper: ClassVar[str] = "arXiv 2307.15049"

    def __post_init__(self) -> None:
        if self.initial <= self.threshold:
            raise ValueError(
                f"method.initial={self.initial:g} is not above method.threshold={self.threshold:g}, so every "
                "weight would start switched off; raise method.initial."
            )

    @property
    def reads_gradients(self) -> bool:
        return self.gdr > 0

    def delta(self, site: Site) -> Mask:
        return Mask(site.shape, self.initial, self.threshold)

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        if not self.penalty:
            return 0.0
        return self.penalty * torch.stack([mask.scores.norm() for mask in find_masks(state)]).sum()

    def after_backward(self, run: Run, state: Any) -> None:
        # Only these: a selector may freeze some scores for a step.
        trained = [mask.scores for mask in find_masks(state) if mask.scores.requires_grad]
        if not self.gdr or not trained:
            return
        # The seed is the same on all ranks, and the numbers are drawn on the device that uses them.
        seed = int(torch.randint(2**62, (), generator=run.generator))
        generator = torch.Generator(trained[0].device).manual_seed(seed)
        for scores, b in zip(trained, self.teacher_gradients(run, state, trained), strict=True):
            if scores.grad is not None:
                uniform = torch.rand(b.shape, generator=generator, device=b.device)
                scores.grad = damp(scores.grad, b, self.gdr, uniform)

    def teacher_gradients(self, run: Run, state: Any, trained: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients b of the mean cross-entropy to the teacher, over all examples of the step."""
        sums, counted = [torch.zeros_like(scores) for scores in trained], 0
        scaler = getattr(run.optimizer, "scaler", None)  # in fp16 a is scaled, so b must be
        for batch in run.batch:
            if batch is None:
                continue
            taught = run.reference("base")(batch).logits
            wanted = F.softmax(scored(taught, batch.labels.to(taught.device)) / self.temperature, -1)
            given = F.log_softmax(run.logits(batch) / self.temperature, -1)
            loss = -(wanted * given).sum() * (self.temperature**2 / max(1, len(wanted)))
            if scaler:
                loss = scaler.scale(loss)
            grads = torch.autograd.grad(loss, trained, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total.add_(grad, alpha=len(wanted))
            counted += len(wanted)
        mean = run.average_or_broadcast(torch.tensor(float(counted), device=sums[0].device))
        return [run.average_or_broadcast(total) / mean for total in sums]

    def after_step(self, run: Run, state: Any) -> None:
        masks = find_masks(state)
        off = torch.stack([mask.off().sum() for mask in masks]).sum()
        run.log(masked=float(off) / sum(mask.scores.numel() for mask in masks))
