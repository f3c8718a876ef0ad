"""Adapters, then LoRA: a warm-up trains bottleneck adapters, and LoRA is trained on top of them.

The first ``share`` of the steps trains adapters and the norms of the model, as ``method=adapter`` does. They
stay where they are, frozen, and the other steps train a low-rank change of each weight, as ``method=lora``
does. The head is trained throughout. Optimizer, learning rate and warm-up start again with the second phase.

Formula:
    phase 1: y' = W x + up(f(down(W x)))        trained: up, down, norms
    phase 2: y' = W' x + up(f(down(W' x)))        W' = W + (alpha / rank) B A; trained: A and B
    A layer without an adapter behind it computes W x, then W' x.

Paper: None. To our knowledge no published system trains exactly this; it is a combination of this project,
and the simplest user of phases that build on each other. The parts are those of Houlsby et al., arXiv
1902.00751, and of Hu et al., arXiv 2106.09685.

Reading: See ``method=adapter`` and ``method=lora``, whose defaults the two phases have. The second phase
starts with B = 0, so its first output is that of the first phase's end. A quarter of the steps for the first
phase is a choice, and no other was tried.

Rate: None published. Both phases have the same one.

Differs: There is no code to compare with.

Cost: What both methods cost, one after the other: gradients and moments are those of one phase at a time,
and both changes are stored. No weight can hold the adapters, so the result cannot be merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from ... import registry
from ...core.method import Method, Phase
from ...registry import register


@register("adapter_lora")
@dataclass(frozen=True)
class AdapterLoRA(Method):
    """Adapters, then LoRA: a warm-up trains bottleneck adapters, and LoRA is trained on top of them.

    Options:
        share: Share of the steps that train the adapters.
        bottleneck: Width of the adapters.
        place: The sub-layers that get an adapter: ``attention``, ``mlp`` or ``both``.
        rank: Rank of the low-rank change.
        alpha: Scale of the low-rank change; it is multiplied by alpha / rank.
        targets: Layers that get a low-rank change: roles, groups of roles, or patterns of layer names.
    """

    share: Annotated[float, Gt(0), Lt(1)] = 0.25
    bottleneck: Annotated[int, Ge(1)] = 64
    place: Literal["attention", "mlp", "both"] = "both"
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    targets: tuple[str, ...] = ("all",)

    family: ClassVar[str] = "adapter"
    trains: ClassVar[str] = "a small network in each block, then two factors of rank r per layer"
    size: ClassVar[str] = "rank"
    mergeable: ClassVar[bool] = False

    def faults(self, steps: int) -> list[str]:
        if 0 < round(self.share * steps) < steps:
            return []
        return [
            f"method.share={self.share:g} of the run's {steps} steps leaves no step for one of the two "
            "phases; choose another share."
        ]

    def phases(self) -> tuple[Phase, ...]:
        adapter, lora = (registry.get("method", name) for name in ("adapter", "lora"))
        first = adapter(rank=self.bottleneck, place=self.place)
        second = lora(rank=self.rank, alpha=self.alpha, targets=self.targets)
        return Phase(first, self.share, "restart", keeps=True), Phase(second, 1 - self.share, "restart")
