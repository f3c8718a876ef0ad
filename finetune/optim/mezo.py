"""MeZO: a step from two forward passes, without gradients; and Sparse-MeZO, which moves only small values.

Each step draws one direction z from the normal distribution. It measures the loss of the step's batch at the
trained values plus and minus ``eps`` z, in eval mode, and moves the values along z in proportion to the
difference. No gradient is computed, and the optimizer has no moments. The direction is not stored: it is
drawn again, in chunks, whenever it is used. Each tensor has a stream of its own, which follows from the run's
seed, the tensor's name and the step (see ``core/seeded.py``). The numbers are therefore the same on every
device and process, and do not depend on the other tensors. A run can be rebuilt from its start and two of its
metrics, ``lr`` and ``projected_gradient`` of every step.

With ``sparsity`` above 0 the direction is 0 for that share of each matrix. ``mask=smallest`` moves the values
whose magnitude is at most a threshold, fixed for each matrix before the first step. The mask is computed from
the values before each step and kept, at 1 bit per value, until the step ends. ``mask=random`` draws the
moving values once per run.

Formula:
    g = (L(x + eps m z) - L(x - eps m z)) / (2 eps)        L: mean loss of the batch, one number
    x <- x - lr (g m z + weight_decay m x)                 m = 1 without sparsity
    m = 1 where |x| <= h, else 0                           h: the (1 - sparsity) quantile of |x| at the start

Paper: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv 2305.17333;
Liu et al., "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning", NeurIPS
2025, arXiv 2402.15751.

Reading: For MeZO, the paper and the released code were read; for Sparse-MeZO the text of the paper (v2), as
its code was not available. The algorithm in that paper compares the value itself with h, and the text says
the magnitude, which is taken here. The paper does not say how vectors are treated; here vectors, and tensors
whose values all have one magnitude (a factor of LoRA that starts at 0), move as a whole. The entries of a
sparse bank are changes that start at 0, and move as a whole too. The paper states neither learning rates nor
``eps``; the defaults are those of MeZO.

Differs:
- The released code of MeZO draws from the global generator of the device, in the order of the tensors, so
  that its numbers depend on the device and on which tensors are trained, and its steps are not logged.
- The released code trains float16 weights in place. Here trained values are float32, and adding and
  subtracting the perturbation makes them drift by about 1e-9 per step.
- Weight decay does not act on vectors, as with every optimizer here; in the released code it does not act on
  names with ``bias``, ``layer_norm`` or ``layernorm``.
- The average over several directions per step, the variants with momentum or Adam, and losses that are not
  differentiable are left out; so is the form of Sparse-MeZO that perturbs inside the forward pass.

Cost: Two forward passes per step, and three passes over the trained values that draw random numbers (on one
CPU core about 30 ns per value and pass; not measured on a GPU). No gradients, activations or moments are
kept. Sparsity adds 1 bit per value during a step, and once a copy of the largest matrix to find its
threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ..core import seeded
from ..core.linalg import kth_smallest
from ..core.optimizer import Optimizer
from ..core.run import Run
from ..core.state import entry_stores
from ..errors import ConfigError
from ..registry import register


@register("mezo")
@dataclass(frozen=True)
class MeZO(Optimizer):
    """MeZO: steps from two forward passes along a random direction, without gradients.

    Options:
        eps: Size of the perturbation: the loss is measured at the values plus and minus ``eps`` times the
            direction.
        sparsity: Share of each matrix that does not move; 0 is MeZO, above it Sparse-MeZO.
        mask: Which values of a matrix move: the ``smallest`` in magnitude, or a ``random`` share (the
            control of Sparse-MeZO).
    """

    lr: Annotated[float, Gt(0)] = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.0
    eps: Annotated[float, Gt(0)] = 1e-3
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.0
    mask: Literal["smallest", "random"] = "smallest"

    needs_grad: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.mask != "smallest" and not self.sparsity:
            raise ValueError(
                f"optimizer.mask={self.mask} has no effect with optimizer.sparsity=0, where every value "
                "moves; set optimizer.sparsity, or leave optimizer.mask out."
            )

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> torch.optim.Optimizer:
        """Return a torch optimizer that only holds the groups and their settings; its own step is not called.

        Raises ``ConfigError`` if ``sparsity`` is set and no matrix is trained.
        """
        matrices = [p for group in groups for p in group["params"] if p.ndim > 1]
        if self.sparsity and not matrices:
            raise ConfigError(
                f"optimizer.sparsity={self.sparsity:g} has no effect: the method trains no matrix, and other "
                "tensors move as a whole. Set optimizer.sparsity=0, or choose a method that trains matrices, "
                "such as method=full or method=lora."
            )
        return torch.optim.Optimizer(groups, {"lr": self.lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        """Measure the loss on both sides of the values, and move the values.

        Perturbations are undone by subtraction, so values are restored up to rounding. They are also restored
        if ``evaluate`` raises an error.
        """
        directions = list(self._directions(run))
        try:
            losses = []
            for place in (1, -1):
                for direction in directions:
                    direction.move_to(place)
                losses.append(evaluate())
        except BaseException:
            for direction in directions:
                direction.move_to(0)
            raise
        slope = (losses[0] - losses[1]) / (2 * self.eps)
        for direction in directions:
            direction.finish(slope)
        run.log(projected_gradient=slope)

    def _directions(self, run: Run) -> Iterator[Direction]:
        """Make the direction of each trained tensor in the current step."""
        names = {id(parameter): name for name, parameter in run.states.named_parameters()}
        counts = {id(store.values): store.bounds()[-1] for store in entry_stores(run.states)}
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:  # a method or a selector freezes it in this step
                    continue
                name = names[id(parameter)]
                count = counts.get(id(parameter), parameter.numel())  # a store may have unused room
                yield Direction(
                    parameter.view(-1)[:count],
                    seed=seeded.seed_for(run.seed, name),
                    step=run.step,
                    eps=self.eps,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    mask=self._mask(run, name, parameter),
                )

    def _mask(self, run: Run, name: str, parameter: nn.Parameter) -> Callable[[slice, Tensor], Tensor] | None:
        """Return a function that maps a slice and its values to the mask; None if the whole tensor moves."""
        if not self.sparsity or parameter.ndim < 2:
            return None
        if self.mask == "random":
            return _RandomMask(seeded.seed_for(run.seed, f"{name}/mask"), 1 - self.sparsity)
        state = run.optimizer.state[parameter]
        if "threshold" not in state:
            state["threshold"] = find_threshold(parameter, self.sparsity)
        threshold = float(state["threshold"])
        return None if math.isinf(threshold) else _MagnitudeMask(threshold)


class Direction:
    """The direction of one tensor in one step; it is drawn again whenever it is needed.

    ``values`` [n]: a view of the tensor. ``place``: the values are now at their start plus ``place * eps``
    times the direction.
    """

    def __init__(
        self,
        values: Tensor,
        seed: int,
        step: int,
        eps: float,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        mask: Callable[[slice, Tensor], Tensor] | None = None,
    ) -> None:
        self.values, self.seed, self.step, self.eps = values, seed, step, eps
        self.lr, self.weight_decay = lr, weight_decay
        self.place = 0
        self.masks: dict[int, Tensor] | None = None
        if mask is not None:
            self.masks = {}
            for place in seeded.chunk_places(len(values), values.device):
                self.masks[place.start] = pack_bits(mask(place, values[place]))

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield for each chunk the values, the direction, and the mask that it is multiplied by."""
        numbers = seeded.normal_chunks(len(self.values), self.seed, self.step, device=self.values.device)
        for place, z in numbers:
            values, mask = self.values[place], None
            if self.masks is not None:
                mask = unpack_bits(self.masks[place.start], len(values))
                z = z.mul_(mask)
            yield values, z.to(values.dtype), mask

    def move_to(self, place: int) -> None:
        """Perturb the values, so that they lie ``place * eps`` along the direction from their start."""
        if place != self.place:
            for values, z, _ in self.chunks():
                values.add_(z, alpha=(place - self.place) * self.eps)
        self.place = place

    def finish(self, slope: float) -> None:
        """Restore the values, and move them by a step for the loss's ``slope`` along the direction."""
        for values, z, mask in self.chunks():
            values.add_(z, alpha=-self.place * self.eps)
            change = z.mul_(slope)
            if self.weight_decay:
                change.add_(values if mask is None else values * mask, alpha=self.weight_decay)
            values.sub_(change, alpha=self.lr)
        self.place = 0


@dataclass(frozen=True)
class _MagnitudeMask:
    threshold: float

    def __call__(self, place: slice, values: Tensor) -> Tensor:
        return values.abs() <= self.threshold


@dataclass(frozen=True)
class _RandomMask:
    seed: int
    share: float

    def __call__(self, place: slice, values: Tensor) -> Tensor:
        words = seeded.draw_words(place.start, place.stop, self.seed, device=values.device)
        return words < round(self.share * 2**32)


def find_threshold(values: Tensor, sparsity: float) -> Tensor:
    """Return the magnitude that the share 1 - ``sparsity`` of ``values`` does not exceed, as a scalar.

    It is infinite if all magnitudes are equal, as in a tensor of zeros. At least one value is selected.
    """
    magnitudes = values.detach().abs()
    if magnitudes.min() == magnitudes.max():
        return torch.full_like(magnitudes.min(), math.inf)
    selected = max(1, round((1 - sparsity) * magnitudes.numel()))
    return kth_smallest(magnitudes, selected - 1)


def pack_bits(flags: Tensor) -> Tensor:
    """Return the flags [n] as bits of bytes, uint8 [n / 8, rounded up]."""
    padded = nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    packed = torch.zeros_like(padded[:, 0])
    for bit in range(8):
        packed |= padded[:, bit] << bit
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` flags that ``pack_bits`` packed, bool."""
    bits = [(packed >> bit) & 1 for bit in range(8)]
    return torch.stack(bits, -1).view(-1)[:count].bool()
