"""SNELLA: SNELL whose layers compete for a shrinking number of non-zero entries.

SNELLA changes SNELL in two ways. A softmax term with three trained scalars is added to the kernel K_0, and
the share of zeroed entries differs between layers. One budget of non-zero entries for all layers together
shrinks along a cubic curve between the shares ``start`` and ``end`` of the run. Every ``every`` steps it is
divided among the layers in proportion to a score of their factors, and no layer gets more than its size.
After every step the averages that make up the score are updated with the step's gradient.

Formula:
    K = K_0 + alpha softmax(K_0 / gamma) + beta     softmax over a layer's outputs
    alpha, gamma, beta start at 1, 1, 0             all three are trained
    change = K |K| (or as ``sparsifier`` says) for the V_l largest |K| of layer l, else 0
    V(t) = V_end + (V_start - V_end) (1 - t)^3      t: from 0 at ``start`` to 1 at ``end``
    V_start = (1 - initial) n,  V_end = (1 - sparsity) n      n: entries of all layers
    i = |X dL/dX|                                   for both factors X of a layer
    I <- beta1 I + (1 - beta1) i,  U <- beta2 U + (1 - beta2) |i - I|
    score of a layer = mean(I U) of its rows + mean(I U) of its columns

Paper: "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", 2025, arXiv
2510.24037.

Reading: The released code and the abstract of the paper were read; the paper's own values are unverified. As
in the code, X in i is the factor after the update, and dL/dX is from before it. ``sparsity`` is the mean
zeroed share at the end, ``initial`` that at the start. At 0 only the entry with the smallest |K| is zeroed.
Unlike in SNELL, the change then keeps its factor |K|. rank, scale and betas are those of the released
scripts; 0.9 is the code's default for ``sparsity``.

Rate: The released scripts have 1e-3 over 100 epochs, and 1e-4 for one task; the default of the code is 5e-4
over 300. The rate of the paper is unverified.

Differs:
- The code counts epochs; this file counts shares of the run and steps. V_end is reached at ``end``, or before
  the last step at the latest.
- If all layers score 0, they get parts in proportion to their sizes; the code fails then.
- The parts are whole numbers that add up to V; the code's float32 sums may miss V by a few entries.
- The code does not save a layer's share in its checkpoints; here it is saved.
- Left out: the moving average of the weights, which in the code keeps the first division for good, and the
  variant without a threshold, which three of the released scripts run under the name of SNELLA.

Cost: rank (in + out) + 3 trained values per layer, their gradients and two moments in Adam, and two averages
per value of the factors. The factors, the three scalars and V_l are stored.
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
from ...core.part import Cache
from ...core.site import Site
from ...core.sparse.select import apportion
from ...errors import ConfigError
from ...registry import register

FACTORS = ("rows", "cols")
AVERAGES = ("importance", "uncertainty")
Share = Annotated[float, Ge(0), Lt(1)]


class Competing(Kernel):
    """A kernel with a trained softmax term, whose ``volume`` largest entries make up the change.

    ``mix`` [3]: alpha, gamma, beta. ``volume``: int64 scalar, V_l.
    """

    volume: Tensor

    def __init__(self, shape: tuple[int, int], method: SNELLA) -> None:
        super().__init__(shape, method)
        self.across = method.softmax  # a softmax needs whole columns
        if method.softmax:
            self.mix = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
        self.size = shape[0] * shape[1]
        volume = self.size
        if method.initial:
            volume = self.size - 1 - int(method.initial * (self.size - 1))
        self.register_buffer("volume", torch.tensor(volume))
        for name in FACTORS:
            for average in AVERAGES:
                self.register_buffer(f"{name}_{average}", torch.zeros_like(self.get_parameter(name)))

    def threshold(self, kernel: Tensor) -> Tensor:
        return kth_smallest(kernel.abs(), max(0, self.size - 1 - int(self.volume)))

    def _difference(self, distance: Tensor, out: Tensor | None = None) -> Tensor:
        kernel = super()._difference(distance, out)
        if not self.across:
            return kernel
        alpha, gamma, beta = self.mix.detach()
        return kernel.addcmul_(torch.softmax(kernel / gamma, 0), alpha).add_(beta)

    def _slope(self, grad: Tensor, distance: Tensor, cache: Cache, more: list[Tensor]) -> Tensor:
        if not self.across:
            return super()._slope(grad, distance, cache, more)
        alpha, gamma, beta = self.mix.detach()
        first = super()._difference(distance)
        soft = torch.softmax(first / gamma, 0)
        slope = self._slope_of(first.addcmul(soft, alpha).add_(beta), cache).mul_(grad)  # dL/dK
        inner = soft * slope
        total = inner.sum(0)
        inner.sub_(soft.mul_(total)).mul_(alpha / gamma)  # dL/dK_0 through the softmax
        more[0] += torch.stack([total.sum(), -(first.mul_(inner).sum()) / gamma, slope.sum()])
        return slope.add_(inner)

    @torch.no_grad()
    def observe_gradient(self, betas: tuple[float, float]) -> None:
        """Update importance and uncertainty with the gradient of the current step."""
        for name in FACTORS:
            x = self.get_parameter(name)
            if x.grad is None:
                continue
            # A scaled fp16 gradient may be infinite; the optimizer has then skipped the step.
            seen = (x * x.grad).abs_().nan_to_num_(0.0, 0.0, 0.0)
            mean = self.get_buffer(f"{name}_importance").lerp_(seen, 1 - betas[0])
            self.get_buffer(f"{name}_uncertainty").lerp_(seen.sub_(mean).abs_(), 1 - betas[1])

    def score(self) -> Tensor:
        """Return the sum over both factors of the mean of importance times uncertainty; float64 scalar."""
        means = []
        for name in FACTORS:
            importance, uncertainty = (self.get_buffer(f"{name}_{kind}").double() for kind in AVERAGES)
            means.append((importance * uncertainty).mean())
        return torch.stack(means).sum()

    def pack(self) -> dict[str, Tensor]:
        """Return what a finished run stores: everything but the averages that the score is made of."""
        return {name: t for name, t in self.state_dict().items() if not name.endswith(AVERAGES)}

    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Load what ``pack`` returned. Raises ``ConfigError`` if it does not fit."""
        for name, tensor in self.pack().items():
            if tensor.shape != stored[name].shape:
                raise ConfigError("The stored factors do not fit this model's layers.")
        self.load_state_dict(stored, strict=False)


@register("snella")
@dataclass(frozen=True)
class SNELLA(Kernelized):
    """SNELLA: SNELL with the non-zero entries divided among the layers by a score.

    Options:
        sparsity: Mean share of the change's entries that is zeroed at the end.
        softmax: Whether the softmax term is added to the kernel.
        initial: Mean share of the change's entries that is zeroed at the start.
        start: Share of the run after which the budget begins to shrink.
        end: Share of the run after which the budget has its final size.
        every: Number of steps from one division of the budget to the next.
        betas: Decay of the average importance and of the average uncertainty.
    """

    softmax: bool = True
    initial: Share = 0.0
    start: Share = 0.0
    end: Annotated[float, Gt(0), Le(1)] = 0.8
    every: Annotated[int, Ge(1)] = 10
    betas: tuple[Share, Share] = (0.85, 0.85)

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = (
        "two factors per layer; their kernel, thresholded by a budget that layers compete for, changes the "
        "weight"
    )
    paper: ClassVar[str] = "arXiv 2510.24037"
    neutral_start: ClassVar[bool] = False

    @property
    def reads_gradients(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.initial > self.sparsity:
            raise ValueError(
                f"method.initial={self.initial:g} is above method.sparsity={self.sparsity:g}, but the budget "
                "can only shrink; lower method.initial."
            )
        if self.start >= self.end:
            raise ValueError(
                f"method.start={self.start:g} is not before method.end={self.end:g}; lower method.start."
            )

    def faults(self, steps: int) -> list[str]:
        first, last = self._range(steps)
        if first < last:
            return []
        return [
            f"train.steps={steps} leaves no step between method.start={self.start:g} and "
            f"method.end={self.end:g} at which the budget could be divided; take more steps, or move start "
            "and end apart."
        ]

    def meets_target(self, step: int, total: int) -> bool:
        return step >= self._range(total)[1]

    def _range(self, steps: int) -> tuple[int, int]:
        """Return the steps between which the budget shrinks; at least one step has its final size."""
        return round(self.start * steps), min(round(self.end * steps), steps - 1)

    def budget(self, step: int, steps: int, entries: int) -> int:
        """Return V: how many of all ``entries`` may be non-zero at ``step`` of ``steps``."""
        first, last = self._range(steps)
        most, least = round((1 - self.initial) * entries), round((1 - self.sparsity) * entries)
        done = min(max(step - first, 0) / max(last - first, 1), 1.0)
        return least + int((most - least) * (1 - done) ** 3)

    def delta(self, site: Site) -> Competing:
        return Competing(site.shape, self)

    def before_step(self, run: Run, state: Any) -> None:
        first, last = self._range(run.total)
        due = (run.step - first) % self.every == 0 or run.step == last
        if run.step <= first or not due:
            return
        deltas = competing_deltas(state)
        sizes = [delta.size for delta in deltas]
        total = self.budget(run.step, run.total, sum(sizes))
        scores = run.average_or_broadcast(torch.stack([delta.score() for delta in deltas]))
        if not scores.any():
            scores = torch.tensor(sizes)
        parts = apportion(total, scores, sizes)
        zeroed = []
        for delta, part in zip(deltas, parts, strict=True):
            delta.volume.fill_(part)
            zeroed.append(1 - part / delta.size)
        run.log(sparsity=1 - total / sum(sizes), sparsity_least=min(zeroed), sparsity_most=max(zeroed))

    def after_step(self, run: Run, state: Any) -> None:
        for delta in competing_deltas(state):
            delta.observe_gradient(self.betas)


def competing_deltas(state: nn.Module) -> list[Competing]:
    """Return the changes that compete for the budget."""
    return [module for module in state.modules() if isinstance(module, Competing)]
