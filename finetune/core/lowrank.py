"""The low-rank change of one weight, as in LoRA (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .changes import Changes, LowRankChange
from .part import Delta


class LowRank(Delta):
    """``alpha / rank * B A`` with A [rank, in] and B [out, rank] in float32; B starts at zero."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, shape[1]))
        self.b = nn.Parameter(torch.zeros(shape[0], rank))
        self.scale, self.dropout = alpha / rank, dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def describe(self) -> str:
        return "a low-rank change"

    def changes(self) -> Changes:
        return Changes(factors=LowRankChange(self.a, self.b, self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * (self.b @ self.a)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a.dtype)
        return F.linear(F.linear(x, self.a) * self.scale, self.b)
