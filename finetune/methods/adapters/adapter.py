"""Bottleneck adapters: a small trained network in each block, after a sub-layer or parallel to it.

The output of a bottleneck with ``rank`` features is added to the output of the attention, of the MLP or of
both, before the sum with the residual stream and before a norm of that sum. Its input is one of four tensors
(``reads``). The published forms differ only in these settings, and each has a file: ``method=houlsby``,
``method=pfeiffer``, ``method=adaptformer``.

Formula:
    y' = y + scale (W_up f(W_down r + c) + e)      y: output of the sub-layer
    r = y                                 reads=output: sequential
    r = input of the sub-layer            reads=input: parallel; after its norm in pre-norm blocks
    r = residual stream                   reads=residual: parallel; before its norm in pre-norm blocks
    r = residual stream + y               reads=sum: after its norm in post-norm blocks (BERT)
    own_norm: r is normalized first, by a trained layer norm

Paper: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv 1902.00751. Pfeiffer
et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021, arXiv 2005.00247.
Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv
2205.13535. The parallel form: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning",
ICLR 2022, arXiv 2110.04366.

Reading: The released codes were read (adapter-bert, adapters, AdaptFormer); the papers are cited from memory.
The defaults are those of Houlsby. ``start=zero`` sets W_up, c and e to 0 and W_down to Kaiming's uniform
distribution with a = sqrt(5), so step 0 is exactly the base; it is the start of AdaptFormer. ``start=near``
is that of adapter-bert: both matrices from a normal distribution of standard deviation 1e-3, cut at two
deviations. AdaptFormer reads the stream before the norm; the parallel adapter of He et al. reads the input of
the MLP. In a pre-norm model ``reads=sum`` reads the stream after the sub-layer, without a norm.

Rate: AdaptFormer's released code has 0.1 for a batch of 256, with momentum SGD. Those of the other papers are
unverified.

Differs:
- The adapter directly follows the output projection; in adapter-bert the model's dropout lies between them.
- In its Houlsby and Pfeiffer forms, the library ``adapters`` starts both matrices from N(0, 0.02), so their
  product is 400 times as large as in adapter-bert. Neither model is exactly the base at step 0.
- The layer norm flags of ``adapters`` were written for post-norm models; here the norm has the place that it
  has in the block.
- AdaptFormer also trains a batch norm before the head; here the head is the model's. Its optimizer is SGD
  with momentum; here it is that of the run.

Cost: 2 rank d + rank + d trained values per adapter (2 d more with ``own_norm``, 1 with ``train_scale``),
their gradients and two moments in Adam; the adapters are stored. An adapter costs 2 rank d multiplications
for each token, also after training: it is not linear, so it cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.anatomy import Anatomy, Sublayer
from ...core.edit import Edit
from ...core.inplace import InPlace
from ...core.method import Method
from ...core.roles import roles
from ...registry import register

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
NEAR = 1e-3  # standard deviation of ``start=near``


class Bottleneck(Edit):
    """``scale (W_up f(W_down r + c) + e)``, with ``down`` [rank, width] and ``up`` [width, rank] in float32.

    ``norm_after``: a frozen norm of the model, applied to the sum that is read; None if there is none.
    """

    def __init__(self, width: int, method: Adapter, norm_after: nn.Module | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, method.rank), nn.Linear(method.rank, width)
        self.own_norm = nn.LayerNorm(width) if method.own_norm else None
        self.reads, self.function, self.dropout = method.reads, FUNCTIONS[method.function], method.dropout
        self._norm_after = norm_after if norm_after is None else [norm_after]  # in a list: not registered
        self.scale: float | nn.Parameter = method.scale
        if method.train_scale:
            self.scale = nn.Parameter(torch.tensor(method.scale))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if method.start == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        else:
            for layer in (self.down, self.up):
                nn.init.trunc_normal_(layer.weight, std=NEAR, a=-2 * NEAR, b=2 * NEAR)

    def describe(self) -> str:
        return "a bottleneck adapter"

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        read = x
        if self.reads == "output":
            read = y
        elif self.reads == "sum":
            read = x + y
            if self._norm_after:
                read = self._norm_after[0](read)
        if not torch.is_autocast_enabled(read.device.type):
            read = read.to(self.down.weight.dtype)
        if self.own_norm is not None:
            read = self.own_norm(read)
        hidden = F.dropout(self.function(self.down(read)), self.dropout, self.training)
        change: Tensor = self.up(hidden) * self.scale
        return change


@register("adapter")
@dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck adapters: a small trained network in each block, after a sub-layer or parallel to it.

    Options:
        rank: Width of the bottleneck.
        place: The sub-layers that get an adapter: ``attention``, ``mlp`` or ``both``.
        reads: What the adapter reads: the ``output`` or the ``input`` of the sub-layer, the ``residual``
            stream before it, or the ``sum`` of stream and output.
        function: The function between the two layers.
        scale: Factor of the adapter's output.
        train_scale: Whether each adapter trains its factor, from ``scale``.
        own_norm: Whether the adapter normalizes its input with a layer norm of its own.
        train_norms: Whether the norms of the model are trained, too.
        dropout: Probability that a feature of the bottleneck is dropped in training.
        start: Whether the output of the adapters starts at exactly ``zero``, or ``near`` it.
    """

    rank: Annotated[int, Ge(1)] = 64
    place: Literal["attention", "mlp", "both"] = "both"
    reads: Literal["output", "input", "residual", "sum"] = "output"
    function: Literal["relu", "gelu", "swish", "tanh", "identity"] = "gelu"
    scale: Annotated[float, Gt(0)] = 1.0
    train_scale: bool = False
    own_norm: bool = False
    train_norms: bool = True
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    start: Literal["zero", "near"] = "zero"

    family: ClassVar[str] = "adapter"
    trains: ClassVar[str] = "a small network in each block, and the norms"
    paper: ClassVar[str] = "arXiv 1902.00751"
    size: ClassVar[str] = "rank"
    mergeable: ClassVar[bool] = False

    @property
    def neutral_start(self) -> bool:  # type: ignore[override]  # here a setting decides
        """Tell whether the model computes what the base computes at step 0."""
        return self.start == "zero"

    def build(self, model: nn.Module) -> nn.ModuleDict:
        anatomy = Anatomy.of(model)
        adapters = nn.ModuleDict()
        for block in anatomy.blocks:
            places = {"attention": block.attention, "mlp": block.mlp}
            for name, part in places.items():
                if self.place in (name, "both"):
                    key = f"{block.name.replace('.', '/')}/{name}"
                    adapters[key] = self.attach_adapter(model, anatomy, part)
        state = nn.ModuleDict({"adapters": adapters})
        if self.train_norms:
            state["norms"] = InPlace(model, list_norm_parameters(model), keep=True)
        return state

    def attach_adapter(self, model: nn.Module, anatomy: Anatomy, part: Sublayer) -> Bottleneck:
        """Make an adapter, and attach it to the output of a sub-layer."""
        before = part.norm.name if anatomy.norm_first else part.first.name  # receives the residual stream
        reads = {"output": None, "input": part.first.name, "residual": before, "sum": before}[self.reads]
        norm_after = part.norm.module if self.reads == "sum" and not anatomy.norm_first else None
        adapter = Bottleneck(anatomy.width, self, norm_after)
        adapter.on(model, part.last.name, reads=reads)
        return adapter


def list_norm_parameters(model: nn.Module) -> list[str]:
    """List the parameters of the norms of the model's body."""
    norms = [name for name, role in roles(model).items() if role == "norm"]
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms]
