"""(IA)^3: factors of the keys, the values and the hidden features of the MLP.

Three vectors per block, which start at 1, multiply the keys, the values and the input of the down projection,
feature by feature and alike for all tokens. Apart from a new head, nothing else is trained. The factors can
be merged into rows and columns of the weights, and into biases.

Formula:
    k = l_k * (W_k x + b_k)      v = l_v * (W_v x + b_v)      y = W_down (l_ff * h) + b_down
    merged: diag(l_k) W_k, l_k * b_k;  diag(l_v) W_v, l_v * b_v;  W_down diag(l_ff), b_down
    gate g: each l stands for 1 + g (l - 1)

Paper: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
NeurIPS 2022, arXiv 2205.05638.

Reading: The released code of the paper and that of huggingface/peft were read. The factors multiply k and v
before the rotation of rotary models, where they can be merged, and h after the nonlinearity. In a gated MLP a
factor of the output of up (``targets=[k,v,up]``) has the same effect as one of h; in a plain MLP it does not.
In the fused projection of GPT-2 the last two thirds, the keys and values, are changed.

Rate: The released code has 3e-3 for 1000 steps.

Differs:
- The two further terms of the paper's loss (the unlikelihood of wrong choices, and the length-normalized
  choice among the answers) are left out.
- peft's defaults also multiply the queries of GPT-2, and for other models the queries instead of the keys.
- To unmerge, peft divides by l + 1e-8, which is inexact; here the base is kept.
- Weight decay does not act on the factors: it would pull them to 0 instead of 1.

Cost: 2 d_kv + d_ff trained values per block, with d_kv = heads of keys and values times their width; their
gradients and two moments in Adam. The factors are stored. After merging, the model costs as much as the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.anatomy import Anatomy, Block
from ...core.edit import Edit, Side
from ...core.method import Method
from ...core.roles import is_transposed
from ...core.site import Site
from ...core.state import StateModule
from ...errors import ConfigError
from ...registry import register

Target = Literal["q", "k", "v", "up", "down"]
PREFIX = "base_model.model."  # precedes every name in a file of peft
FUSED = ("q", "k", "v")  # the order of the parts of qkv


@dataclass(frozen=True)
class Features:
    """A range of features at the input or output of a linear layer: ``count`` of them, from ``first`` on."""

    site: Site
    side: Side
    first: int
    count: int

    @property
    def total(self) -> int:
        """Number of features on that side of the layer."""
        return self.site.shape[0 if self.side == "output" else 1]


class Factors(Edit):
    """One factor for each of some features; ``factor`` [count] float32 starts at 1."""

    keeps_zeros = True  # folding multiplies weights

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.factor = nn.Parameter(torch.ones(features.count))

    def describe(self) -> str:
        return "factors of features"

    def added(self) -> Tensor:
        """Return ``factor - 1``, padded with 0 for the features that are not scaled, [total]."""
        behind = self.features.total - self.features.first - self.features.count
        return F.pad(self.factor - 1, (self.features.first, behind))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.added() * y

    def fold_into(self, module: nn.Module) -> None:
        whole = 1 + self.gate * self.added().double()
        weight = module.get_parameter("weight").data
        matrix = weight.T if is_transposed(module) else weight  # [out, in], a view
        across = whole[:, None] if self.features.side == "output" else whole
        matrix.copy_(matrix.double() * across)
        bias = getattr(module, "bias", None)
        if self.features.side == "output" and bias is not None:
            bias.copy_(bias.double() * whole)


class AllFactors(StateModule):
    """The factors of all layers, by layer and target."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        super().__init__()
        self.factors = nn.ModuleDict(factors)

    def export_as(self, format_name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """Return the factors in the form of peft's IA3, which scales inputs or outputs of whole layers."""
        if format_name != "peft":
            return None
        from peft import IA3Config

        tensors: dict[str, Tensor] = {}
        inputs: list[str] = []
        transposed = False
        for factors in self.factors.values():
            assert isinstance(factors, Factors)
            features, name = factors.features, factors.features.site.name
            transposed |= is_transposed(features.site.module)
            if features.side == "input":
                inputs.append(name)
            shape = (1, -1) if features.side == "input" else (-1, 1)
            whole = (1 + factors.gate * factors.added().detach()).view(shape)
            key = f"{PREFIX}{name}.ia3_l"
            tensors[key] = tensors.get(key, 1.0) * whole  # k and v share the layer of GPT-2
        names = [key.removeprefix(PREFIX).removesuffix(".ia3_l") for key in tensors]
        config = IA3Config(target_modules=names, feedforward_modules=inputs, fan_in_fan_out=transposed)
        return config, tensors


@register("ia3")
@dataclass(frozen=True)
class IA3(Method):
    """(IA)^3: factors of the keys, the values and the hidden features of the MLP.

    Options:
        targets: What is scaled: the outputs of the query, key and value projections (``q``, ``k``, ``v``),
            the output of ``up``, the input of ``down``.
    """

    targets: tuple[Target, ...] = ("k", "v", "down")

    family: ClassVar[str] = "adapter"
    trains: ClassVar[str] = "one factor for each feature of the keys, the values and the MLP's hidden layer"
    paper: ClassVar[str] = "arXiv 2205.05638"

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            given = ",".join(self.targets)
            raise ValueError(f"method.targets=[{given}] must name at least one target, and each only once.")

    def build(self, model: nn.Module) -> AllFactors:
        factors: dict[str, Factors] = {}
        anatomy = Anatomy.of(model)
        for block in anatomy.blocks:
            for target in self.targets:
                features = find_features(anatomy, block, target)
                made = Factors(features)
                made.on(model, features.site.name, edits=features.side)
                factors[f"{features.site.key}:{target}"] = made
        return AllFactors(factors)


def find_features(anatomy: Anatomy, block: Block, target: Target) -> Features:
    """Return the features that ``target`` means in a block. Raises ``ConfigError`` if the block has none."""
    if target in ("up", "down"):
        site = block.mlp.sites[target]
        if target == "up":
            return Features(site, "output", 0, site.shape[0])
        return Features(site, "input", 0, site.shape[1])
    sites = block.attention.sites
    if target in sites:
        return Features(sites[target], "output", 0, sites[target].shape[0])
    if "qkv" not in sites:
        raise ConfigError(
            f"method.targets: block {block.name} has no layer of role {target}; choose from "
            f"{', '.join(sites)}, up and down."
        )
    width = anatomy.heads * anatomy.head_dim
    return Features(sites["qkv"], "output", FUSED.index(target) * width, width)
