"""LoRA: a low-rank change of each weight (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.method import Reparam
from ..core.part import Delta
from ..core.site import Site
from ..registry import register


class LowRank(Delta):
    """``alpha / rank * B A`` with A [rank, in] and B [out, rank] in float32; B starts at zero."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, shape[1]))
        self.b = nn.Parameter(torch.zeros(shape[0], rank))
        self.scale, self.dropout = alpha / rank, dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * (self.b @ self.a)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x.to(self.a.dtype) if not torch.is_autocast_enabled(x.device.type) else x, self.a)
        return F.linear(low * self.scale, self.b)


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

    def delta(self, site: Site) -> LowRank:
        return LowRank(site.shape, self.rank, self.alpha, self.dropout)
