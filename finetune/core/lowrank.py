"""The low-rank change of one weight, as in LoRA (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .changes import Changes, LowRankChange
from .layer import changed_linear
from .part import Delta


class LowRank(Delta):
    """``alpha / rank * B A`` with A [rank, in] and B [out, rank] in float32; B starts at zero.

    On a layer with entries that are held at 0, the product is formed, and is 0 there (MaskLoRA).
    """

    keeps_zeros = True

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, shape[1]))
        self.b = nn.Parameter(torch.zeros(shape[0], rank))
        self.scale, self.dropout = alpha / rank, dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def describe(self) -> str:
        return "a low-rank change" if self.pruned is None else "a low-rank change that is 0 at pruned entries"

    def changes(self) -> Changes:
        if self.pruned is not None:
            return Changes()  # a masked product has no low rank
        return Changes(factors=LowRankChange(self.a, self.b, self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * (self.b @ self.a)

    @property
    def additive(self) -> bool:
        """Tell whether the change is applied beside the layer; only dropout of its input needs that."""
        return self.pruned is None or (self.training and self.dropout > 0)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        if self.pruned is not None:
            return changed_linear(x, torch.zeros_like(weight), None, [self], [1.0])
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a.dtype)
        return F.linear(F.linear(x, self.a) * self.scale, self.b)
