"""SNELLA: SNELL whose layers compete for a shrinking number of non-zero entries (2025, arXiv 2510.24037).

Read from the released code, of the paper only the abstract. Two things are new to SNELL, whose kernel is K_0 (``core/kernel.py``):

    K = K_0 + alpha softmax(K_0 / gamma) + beta     the softmax over a layer's outputs; alpha = gamma = 1, beta = 0 at first, all three trained
    V(t) = V_end + (V_start - V_end) (1 - t')^3     non-zero entries of all layers together, t' from 0 to 1 between the shares ``start`` and ``end``

Every ``every`` steps V is divided, no layer getting more than its size, in proportion to the sum of mean(I U) over the layer's two factors X. After
every step I <- beta1 I + (1 - beta1) i and U <- beta2 U + (1 - beta2) |i - I| with i = |X dL/dX|, X being the updated factor. ``sparsity`` is the
mean zeroed share of the change in the end, ``initial`` that at the start; at 0 only the least entry is zeroed, and the change is K |K| there too.

Other than the code: it counts epochs where this counts shares of the run and steps; V_end is reached at ``end``, or before the last step at the
latest; layers that all score zero get parts in proportion to their sizes, where the code fails; the parts are whole numbers that add up to V. Left
out are its average of the weights over time, which keeps the first division for good, and its variant without threshold, which three scripts run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ...core.kernel import Kernel, Kernelized
from ...core.linalg import kth_smallest
from ...core.method import Run
from ...core.part import Kept
from ...core.site import Site
from ...core.sparse.select import apportion
from ...errors import ConfigError
from ...registry import register

FACTORS = ("rows", "cols")
SMOOTHED = ("importance", "uncertainty")
Share = Annotated[float, Ge(0), Lt(1)]


class Competing(Kernel):
    """A kernel with its learned softmax term (``mix``: alpha, gamma, beta), of which the ``volume`` [] int64 largest entries count."""

    volume: Tensor

    def __init__(self, shape: tuple[int, int], method: SNELLA) -> None:
        super().__init__(shape, method)
        self.across = method.softmax  # a softmax needs its column whole
        if method.softmax:
            self.mix = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
        self.size = shape[0] * shape[1]
        kept = self.size - 1 - int(method.initial * (self.size - 1)) if method.initial else self.size
        self.register_buffer("volume", torch.tensor(kept))
        for name in FACTORS:
            for kind in SMOOTHED:
                self.register_buffer(f"{name}_{kind}", torch.zeros_like(self.get_parameter(name)))

    def threshold(self, kernel: Tensor) -> Tensor:
        return kth_smallest(kernel.abs(), max(0, self.size - 1 - int(self.volume)))

    def _difference(self, distance: Tensor, out: Tensor | None = None) -> Tensor:
        kernel = super()._difference(distance, out)
        if not self.across:
            return kernel
        alpha, gamma, beta = self.mix.detach()
        return kernel.addcmul_(torch.softmax(kernel / gamma, 0), alpha).add_(beta)

    def _slope(self, grad: Tensor, distance: Tensor, kept: Kept, more: list[Tensor]) -> Tensor:
        if not self.across:
            return super()._slope(grad, distance, kept, more)
        alpha, gamma, beta = self.mix.detach()
        first = super()._difference(distance)
        soft = torch.softmax(first / gamma, 0)
        slope = self._slope_of(first.addcmul(soft, alpha).add_(beta), kept).mul_(grad)  # dL/dK
        inner = soft * slope
        total = inner.sum(0)
        inner.sub_(soft.mul_(total)).mul_(alpha / gamma)  # dL/dK_0 through the softmax
        more[0] += torch.stack([total.sum(), -(first.mul_(inner).sum()) / gamma, slope.sum()])
        return slope.add_(inner)

    @torch.no_grad()
    def observe(self, betas: tuple[float, float]) -> None:
        """Smooth importance and uncertainty with this step's gradient."""
        for name in FACTORS:
            x = self.get_parameter(name)
            if x.grad is not None:
                seen = (
                    (x * x.grad).abs_().nan_to_num_(0.0, 0.0, 0.0)
                )  # a scaled gradient may be infinite, and its step was left out
                mean = self.get_buffer(f"{name}_importance").lerp_(seen, 1 - betas[0])
                self.get_buffer(f"{name}_uncertainty").lerp_(seen.sub_(mean).abs_(), 1 - betas[1])

    def score(self) -> Tensor:
        """Importance times uncertainty, the mean over each factor; [] float64."""
        pairs = [[self.get_buffer(f"{name}_{kind}").double() for kind in SMOOTHED] for name in FACTORS]
        return torch.stack([(importance * uncertainty).mean() for importance, uncertainty in pairs]).sum()

    def pack(self) -> dict[str, Tensor]:
        """What is stored of a finished run: all but what divisions go by."""
        return {name: t for name, t in self.state_dict().items() if not name.endswith(SMOOTHED)}

    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Take over what ``pack`` gave. Raises ``ConfigError`` where it does not fit."""
        if any(t.shape != stored[name].shape for name, t in self.pack().items()):
            raise ConfigError("the stored factors do not fit this model's layers.")
        self.load_state_dict(stored, strict=False)


@register("snella")
@dataclass(frozen=True)
class SNELLA(Kernelized):
    """SNELLA: SNELL with the non-zero entries divided among the layers by a score."""

    softmax: bool = True
    initial: Share = 0.0
    start: Share = 0.0
    end: Annotated[float, Gt(0), Le(1)] = 0.8
    every: Annotated[int, Ge(1)] = 10
    betas: tuple[Share, Share] = (0.85, 0.85)

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = (
        "two factors a layer; their kernel, thresholded by a budget that layers compete for, changes the weight"
    )
    paper: ClassVar[str] = "arXiv 2510.24037"
    neutral_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.initial > self.sparsity:
            raise ValueError(
                f"method.initial={self.initial:g} is above method.sparsity={self.sparsity:g}, and the budget only shrinks; lower it."
            )
        if self.start >= self.end:
            raise ValueError(f"method.start={self.start:g} is not before method.end={self.end:g}; lower it.")

    def faults(self, steps: int) -> list[str]:
        first, last = self._range(steps)
        between = f"between method.start={self.start:g} and method.end={self.end:g}"
        return (
            []
            if first < last
            else [
                f"train.steps={steps} leaves no step {between} at which to divide; take more, or move the two apart."
            ]
        )

    def ready(self, step: int, total: int) -> bool:
        return step >= self._range(total)[1]

    def _range(self, steps: int) -> tuple[int, int]:
        """The steps between which the budget shrinks; it is met before the last step, so that something is trained under it."""
        return round(self.start * steps), min(round(self.end * steps), steps - 1)

    def budget(self, step: int, steps: int, entries: int) -> int:
        """V: how many of all ``entries`` may be other than zero at ``step``."""
        (first, last), (most, least) = (
            self._range(steps),
            (round((1 - s) * entries) for s in (self.initial, self.sparsity)),
        )
        done = min(max(step - first, 0) / max(last - first, 1), 1.0)
        return least + int((most - least) * (1 - done) ** 3)

    def delta(self, site: Site) -> Competing:
        return Competing(site.shape, self)

    def before_step(self, run: Run, state: Any) -> None:
        first, last = self._range(run.total)
        if run.step <= first or ((run.step - first) % self.every and run.step != last):
            return
        deltas = [m for m in state.modules() if isinstance(m, Competing)]
        sizes = [d.size for d in deltas]
        total = self.budget(run.step, run.total, sum(sizes))
        scores = run.agree(torch.stack([d.score() for d in deltas]))
        parts = apportion(total, scores if scores.any() else torch.tensor(sizes), sizes)
        for delta, part in zip(deltas, parts, strict=True):
            delta.volume.fill_(part)
        zeroed = [1 - part / size for part, size in zip(parts, sizes, strict=True)]
        run.log(sparsity=1 - total / sum(sizes), sparsity_least=min(zeroed), sparsity_most=max(zeroed))

    def after_step(self, run: Run, state: Any) -> None:
        for module in state.modules():
            if isinstance(module, Competing):
                module.observe(self.betas)
