"""LoRA: a low-rank change of each weight (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from ...core.lowrank import LowRank
from ...core.method import Reparam
from ...core.site import Site
from ...registry import register


@register("lora")
@dataclass(frozen=True)
class LoRA(Reparam):
    """LoRA: a trained low-rank change of each weight."""

    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = "two factors of rank r a layer"
    paper: ClassVar[str] = "arXiv 2106.09685"
    size: ClassVar[str] = "rank"

    def delta(self, site: Site) -> LowRank:
        return LowRank(site.shape, self.rank, self.alpha, self.dropout)
