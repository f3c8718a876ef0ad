"""LoRA-GA: LoRA that starts from the singular vectors of the gradient.

Before training, the gradient of the loss with respect to each weight is taken over a few batches. r of its
first 2r right singular vectors become the rows of A, and the r left singular vectors of the other indices the
columns of B.
The product at the start is taken away again, so the output at step 0 is exactly that of the base model. The
first gradient step then moves the weight along the best approximation of rank 2r to the whole gradient, where
LoRA moves it along a random one of rank r. After that, training is that of LoRA.

Formula:
    W' = W + s (B A - B0 A0) = W + s (B (A - A0) + (B - B0) A0)      s = alpha / sqrt(rank), or alpha / rank
    G = U S V^T        gradient of the loss, [out, in]
    A0 = f V[:, :r]^T, B0 = f U[:, r:2r]        direction=ArB2r
    f = out^(1/4) / sqrt(gamma)        scale=stable
    f = 1 / s        scale=gd
    f = 1        scale=unit
    f = mean of sqrt(S_W[:r] / s), S_W: singular values of W        scale=weight

Paper: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, arXiv
2407.05000.

Reading: The paper's algorithms and the released code (Outsider565/LoRA-GA) were read, not run. The scale s is
that of the paper, alpha / sqrt(rank); the released class has alpha / rank, while the instructions that come
with it ask for the paper's. The base weight is never changed: the layer computes the second form of the
change above, which is exactly 0 at the start in every dtype and does not cancel large products. A layer whose
shorter side is at most 1024 gets an exact singular value decomposition in float64. A larger one gets a
randomized one in float32, with 4 r columns and 4 power iterations as in the released code, from random
numbers that follow from the seed. Signs are chosen so that the largest entry of each left singular vector is
positive. If the gradient has a rank below 2r, the vectors beyond it are orthonormal and otherwise arbitrary.

Rate: The released scripts have 2e-5 for LLaMA 2 7B and 1e-4 for T5-base, cosine with a warm-up of 3 %.

Differs:
- The released code subtracts s B0 A0 from the base weight and rounds the result to the weight's dtype; in
  bfloat16 its output at step 0 is not exactly that of the base.
- Weight decay does not act on A and B. It would pull B A towards 0 and the change towards -s B0 A0, which is
  not 0. With ``optimizer.weight_decay`` above 0, it acts on the head alone.
- The gradient is taken in eval mode; in the released code dropout is on. Batches are those of the next
  training steps, each example or scored token counting once; the released experiments take 8 samples, one at
  a time.
- There is no ``norm_clip``, and no start with equal indices for A and B, which reaches rank r only.
- huggingface/peft differs from the paper: it multiplies B by singular values of the gradient, so that the
  start depends on the loss's scale; under ``stable`` only B is scaled; ``random`` takes equal indices for A
  and B; its other two scales have other formulas. A test compares the subspaces with those of peft.

Cost: rank (in + out) trained values per layer, their gradients and two moments in Adam. The factors of the
start are stored beside those of the end. In each forward pass, the branch has rank 2r. Before training:
forward and backward over ``batches`` steps, and a decomposition of each gradient. At most 1 GiB of gradients
is held at once, or that of one layer; for models with more entries the passes are repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.attach import patched
from ...core.changes import Changes, LowRankChange
from ...core.collective import broadcast_
from ...core.method import Reparam, Run
from ...core.part import Delta
from ...core.site import Site, find_sites
from ...core.statistics import gather_gradients
from ...errors import ConfigError
from ...registry import register

EXACT = 1024  # up to this size of the shorter side, singular value decompositions are exact
ITERATIONS = 4  # power iterations of a randomized decomposition


class Anchored(Delta):
    """``scale * (B A - B0 A0)`` with A [rank, in], B [out, rank] in float32, and their values at the start.

    It is computed as ``B (A - A0) + (B - B0) A0``: two factors of rank 2r that are exactly 0 at the start.
    """

    a0: Tensor
    b0: Tensor
    decays = False  # decay of B A is not decay of the change
    keeps_zeros = True  # pruned layers form the change by ``forward``; ``linear`` is only faster

    def __init__(self, shape: tuple[int, int], rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b = nn.Parameter(torch.zeros(rank, shape[1])), nn.Parameter(torch.zeros(shape[0], rank))
        self.register_buffer("a0", torch.zeros(rank, shape[1]))
        self.register_buffer("b0", torch.zeros(shape[0], rank))

    @torch.no_grad()
    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Set the factors and their values at the start."""
        for old, new in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
            old.copy_(new)

    def describe(self) -> str:
        return "a low-rank change" if self.pruned is None else "a low-rank change that is 0 at pruned entries"

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the change without ``scale``: [2 rank, in] and [out, 2 rank]."""
        return torch.cat([self.a - self.a0, self.a0]), torch.cat([self.b, self.b - self.b0], 1)

    @torch.no_grad()
    def changes(self) -> Changes:
        if self.pruned is not None:
            return Changes()  # a masked product has no low rank
        return Changes(factors=LowRankChange(*self.factors(), self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        return self.scale * (b @ a)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        a, b = self.factors()
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        return F.linear(F.linear(x, a) * self.scale, b)


@register("lora_ga")
@dataclass(frozen=True)
class LoRAGA(Reparam):
    """LoRA-GA: LoRA that starts from the singular vectors of the gradient.

    Options:
        rank: Rank of the trained product; the change has up to twice this rank.
        alpha: Scale of the change; ``scaling`` says how the rank divides it.
        scaling: Whether the change is multiplied by alpha / sqrt(rank) (``rslora``) or alpha / rank
            (``lora``).
        direction: Which of the first 2 rank singular vectors A and B get: the first half and the second
            (``ArB2r``), the second and the first (``A2rBr``), those of odd and of even indices (``ArBr``),
            or a ``random`` half and the other one.
        scale: How large both are at the start. ``stable`` divides by sqrt(``gamma``); ``gd``, ``unit`` and
            ``weight`` do not use ``gamma``. The formulas are above.
        gamma: Divisor of the start under ``scale=stable``; a larger one starts smaller.
        batches: Number of steps whose batches give the gradient.
    """

    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    scaling: Literal["rslora", "lora"] = "rslora"
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "gd", "unit", "weight"] = "stable"
    gamma: Annotated[float, Gt(0)] = 16.0
    batches: Annotated[int, Ge(1)] = 1

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = "two factors of rank r per layer, from the gradient"
    paper: ClassVar[str] = "arXiv 2407.05000"
    size: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if self.scale != "stable" and self.gamma != type(self).gamma:
            raise ValueError(
                f"method.gamma={self.gamma:g} has no effect with scale={self.scale}; take scale=stable."
            )

    @property
    def reads_gradients(self) -> bool:
        return True

    @property
    def factor(self) -> float:
        """Return s, by which the change is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def build(self, model: nn.Module) -> nn.ModuleDict:
        narrow = [site for site in find_sites(model, self.targets) if 2 * self.rank > min(site.shape)]
        if narrow:
            worst = min(narrow, key=narrower_side)
            raise ConfigError(
                f"method.rank={self.rank} needs {2 * self.rank} singular vectors of each gradient. "
                f"{len(narrow)} layers are too narrow for it; the narrowest is {worst.name} with "
                f"{worst.shape[0]} x {worst.shape[1]}. Lower the rank to {min(worst.shape) // 2}, or leave "
                "such layers out of method.targets."
            )
        return super().build(model)

    def delta(self, site: Site) -> Anchored:
        return Anchored(site.shape, self.rank, self.factor)

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        layers = patched(run.model)
        for site, gradient in gather_gradients(run, find_sites(run.model, self.targets), self.batches):
            if site.pruned is not None:
                gradient = gradient.masked_fill(site.pruned, 0)
            u, v = singular_vectors(gradient, 2 * self.rank, run.generator)
            for_a, for_b = self.choose_indices(run.generator)
            size = self.size_of_start(layers[site.name].weight, run.generator)
            state[site.key].start_from(size * v[:, for_a].T, size * u[:, for_b])
        broadcast_(state.state_dict().values())

    def choose_indices(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return which of the first 2 rank singular vectors A gets, and which B gets."""
        both = torch.arange(2 * self.rank)
        if self.direction == "ArBr":
            return both[1::2], both[::2]
        if self.direction == "random":
            both = torch.randperm(2 * self.rank, generator=generator)
        first, second = both.split(self.rank)
        return (second, first) if self.direction == "A2rBr" else (first, second)

    def size_of_start(self, weight: Tensor, generator: torch.Generator) -> float:
        """Return the factor of the singular vectors; ``weight`` [out, in] is that of the layer."""
        if self.scale == "stable":
            return math.sqrt(math.sqrt(len(weight)) / self.gamma)
        if self.scale == "weight":
            u, _ = singular_vectors(weight.float(), self.rank, generator)
            values = torch.linalg.vector_norm(u.T @ weight.to(u.dtype), dim=1)
            return float((values / self.factor).sqrt().mean())
        return 1 / self.factor if self.scale == "gd" else 1.0


def narrower_side(site: Site) -> int:
    """Return the size of the shorter side of a site's weight."""
    return min(site.shape)


def singular_vectors(matrix: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` singular vectors of ``matrix`` [out, in]: [out, count] and [in, count].

    The largest entry of each left vector is positive. They are exact and float64 if the shorter side is at
    most ``EXACT``. Otherwise they are float32 and come from a randomized decomposition with twice as many
    columns, for which numbers are drawn.
    """
    if min(matrix.shape) <= EXACT:
        u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        columns = min(2 * count, *matrix.shape)
        draws = torch.randn(matrix.shape[1], columns, generator=generator)
        basis = torch.linalg.qr(matrix @ draws.to(matrix.device)).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        u, _, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    u, vh = u[:, :count], vh[:count]
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, (vh * signs.T).T
