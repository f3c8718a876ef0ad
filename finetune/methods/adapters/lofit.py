"""LoFiT: train offsets of a few attention heads, chosen by a first phase that trains factors.

The first phase trains a factor for every feature of every head's output, with an L1 penalty, and ranks the
heads by the norm of the factors' change. The second phase starts from the base again and trains one offset
vector for each of the k highest-ranked heads. Apart from a new task head, nothing else is trained.

Formula:
    o_lj = (1 + A_lj) * o_lj + v_lj      o_lj [head_dim]: output of head j of block l, at every position
    phase 1: A trained, v = 0, loss + l1 sum|A|      rank of a head: ||A_lj||_2, the largest first
    phase 2: A = 0, v of the first k heads trained   k = int(share * heads of the model)
    merged: b_o + sum_j W_o[:, slice j] v_lj         W_o, b_o: output projection of block l

Paper: Yin et al., "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv 2406.01563.

Reading: The abstract, the captions and the released code were read, but not the tables of the paper. The
paper takes 10 % of the heads when it compares with LoRA, and 3 % elsewhere. Offsets belong to query heads,
whose outputs are slices of head_dim columns of the output projection's input. A and v start from N(0,
``noise``), so step 0 is not exactly the base; ``noise=0`` makes it exact. The penalty of 5e-4 is that of the
released script for TruthfulQA; others have 1e-3 and 5e-3. The released scripts give both phases the same
number of epochs.

Rate: The released scripts for Llama 2 7B have 5e-3 in the first phase, 5e-4 for one task, and 1e-2 in the
second.

Differs:
- Both phases have the same learning rate, whose schedule and warm-up start again in the second.
- The penalty is over the factors alone; the released code sums it over all trained tensors.
- Vectors and their addition are float32 on a base of lower precision, where an offset of 1e-3 would vanish.
- The preference loss (DPO) that the paper uses for TruthfulQA is left out.
- Merging is refused if the output projection has no bias (Llama); the paper's merge would add one.

Cost: heads * head_dim trained values per block in the first phase, k * head_dim in the second; their
gradients and two moments in Adam. The offsets and the numbers of their heads are stored. After merging, the
model costs as much as the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.changes import Unit
from ...core.edit import Edit
from ...core.method import Method, Phase
from ...core.roles import is_transposed
from ...core.run import Run
from ...errors import ConfigError
from ...registry import register


class HeadFactors(Edit):
    """Multiplies the outputs of a block's heads by 1 + ``a``; ``a`` [heads, head_dim] float32 starts at 0."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(heads, head_dim))

    def describe(self) -> str:
        return "factors of attention heads"

    def units(self) -> list[Unit]:
        """Return the factors without a place, because the offsets of phase 2 belong to no single block."""
        return [Unit("a", None, self.a)]

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.a.flatten() * y


class Offsets(nn.Module):
    """The offsets of the chosen heads of all blocks.

    ``values`` [k, head_dim] float32. ``chosen`` [k] int64: block * heads + head of each, best first.
    """

    chosen: Tensor

    def __init__(self, k: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.values = nn.Parameter(torch.zeros(k, head_dim))
        self.register_buffer("chosen", torch.arange(k))

    def is_in(self, block: int) -> Tensor:
        """Return which of the chosen heads belong to a block: [k] bool."""
        return self.chosen // self.heads == block


class HeadOffsets(Edit):
    """One block's view of the offsets: adds them to the outputs of its heads."""

    keeps_zeros = True  # folding changes the bias alone

    def __init__(self, offsets: Offsets, block: int) -> None:
        super().__init__()
        self._offsets = [offsets]  # in a list: the method's state registers the offsets, and only once
        self.block = block

    @property
    def offsets(self) -> Offsets:
        """Return the offsets of all blocks."""
        return self._offsets[0]

    def describe(self) -> str:
        return "offsets of attention heads before a projection without a bias"

    @property
    def mergeable(self) -> bool:
        return super().mergeable and getattr(self.module, "bias", None) is not None

    @property
    def has_effect(self) -> bool:
        return bool(self.offsets.is_in(self.block).any())

    def row(self) -> Tensor:
        """Return the offsets of the block's heads side by side, 0 for heads that are not chosen."""
        offsets = self.offsets
        mine = offsets.is_in(self.block)
        empty = offsets.values.new_zeros(offsets.heads, offsets.values.shape[1])
        return empty.index_add(0, offsets.chosen[mine] % offsets.heads, offsets.values[mine]).flatten()

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.row().expand_as(y)

    def fold_into(self, module: nn.Module) -> None:
        weight, bias = module.get_parameter("weight").double(), module.get_parameter("bias")
        matrix = weight.T if is_transposed(module) else weight
        bias.copy_(bias.double() + self.gate * (matrix @ self.row().double()))


@dataclass(frozen=True)
class HeadRanking(Method):
    """The first phase of LoFiT: train a factor for every feature of every head."""

    l1: float = 5e-4
    noise: float = 1e-3
    name: ClassVar[str] = "head_ranking"
    neutral_start: ClassVar[bool] = False

    def build(self, model: nn.Module) -> nn.ModuleList:
        anatomy = Anatomy.of(model)
        state = nn.ModuleList()
        for block in anatomy.blocks:
            factors = HeadFactors(anatomy.heads, anatomy.head_dim)
            state.append(factors.on(model, block.attention.last.name, edits="input"))
        return state

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        for factors in state:
            draw_(factors.a, self.noise, run.generator)

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        if not self.l1:
            return 0.0
        return self.l1 * torch.stack([factors.a.abs().sum() for factors in state]).sum()


@register("lofit")
@dataclass(frozen=True)
class LoFiT(Method):
    """LoFiT: offsets of a few attention heads, chosen by a first phase that trains factors.

    Options:
        share: Share of the model's attention heads that get an offset.
        ranking: Share of the run that the first phase takes.
        l1: Factor of the sum of the absolute changes of all factors, in the loss of the first phase.
        noise: Standard deviation of the initial values in both phases.
    """

    share: Annotated[float, Gt(0), Le(1)] = 0.1
    ranking: Annotated[float, Gt(0), Lt(1)] = 0.5
    l1: Annotated[float, Ge(0)] = 5e-4
    noise: Annotated[float, Ge(0)] = 1e-3

    family: ClassVar[str] = "adapter"
    trains: ClassVar[str] = "one offset vector for each of a few attention heads"
    paper: ClassVar[str] = "arXiv 2406.01563"
    size: ClassVar[str] = "share"
    neutral_start: ClassVar[bool] = False

    def faults(self, steps: int) -> list[str]:
        if 0 < round(self.ranking * steps) < steps:
            return []
        return [
            f"train.steps={steps} with method.ranking={self.ranking:g} leaves no step for one of the two "
            "phases; take more steps, or move method.ranking towards 0.5."
        ]

    def phases(self) -> tuple[Phase, ...]:
        first = HeadRanking(self.l1, self.noise)
        return Phase(first, self.ranking, "restart"), Phase(self, 1 - self.ranking, "restart")

    def build(self, model: nn.Module) -> nn.ModuleDict:
        anatomy = Anatomy.of(model)
        total = anatomy.heads * len(anatomy.blocks)
        k = int(round(self.share * total, 9))  # rounded first, so that 0.29 of 100 heads is 29
        if not k:
            raise ConfigError(
                f"method.share={self.share:g} of the model's {total} attention heads is less than one; take "
                f"{1 / total:.2g} or more."
            )
        offsets = Offsets(k, anatomy.heads, anatomy.head_dim)
        views = nn.ModuleList()
        for number, block in enumerate(anatomy.blocks):
            view = HeadOffsets(offsets, number)
            views.append(view.on(model, block.attention.last.name, edits="input"))
        return nn.ModuleDict({"offsets": offsets, "views": views})

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        offsets: Offsets = state["offsets"]
        scores = torch.cat([factors.a.detach().norm(dim=1) for factors in previous])
        scores = run.average_or_broadcast(scores)
        ranked = scores.sort(descending=True, stable=True).indices
        offsets.chosen.copy_(ranked[: len(offsets.chosen)])
        draw_(offsets.values, self.noise, run.generator)


@torch.no_grad()
def draw_(parameter: nn.Parameter, deviation: float, generator: torch.Generator) -> None:
    """Set a parameter to normal random numbers with mean 0, drawn on the CPU."""
    parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
