"""SNELL: sparse tuning with a kernelized low-rank change (Shen et al., 2024, arXiv 2411.01800).

The change of a weight is a signed difference of distances between the rows of small factors, thresholded at a quantile of its own magnitude. Paper
and released code differ in the sparsifier; ``sparsifier`` chooses the reading, ``t`` being the threshold and K the kernel matrix:

    released   change = K |K| where |K| > t, with |K| held constant in the gradient; at sparsity 0 the released code switches to change = K,
               without the factor |K|, so that going from 0 to the smallest positive sparsity shrinks the initial change a thousandfold
    paper      change = K max(|K| - t, 0), eq. 5, differentiated through |K|; at sparsity 0, t is 0 and nothing switches

Both hold t constant, and ``sparsity`` is the share set to zero (the code; one sentence of the paper has it as the share kept). The released code's
own further settings: ``dropout=0.1 drop_path=0.1``; its coefficients +-0.1 are fixed there (learnable in the paper) and fixed here. The class token
is trained too, in place, where a model has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt, MultipleOf
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.inplace import InPlace
from ..core.linalg import kth_smallest
from ..core.method import Reparam
from ..core.part import Delta, Kept, WeightGrad, changed_linear
from ..core.site import Site
from ..registry import register

TINY = 1e-12  # the least squared distance: rows that coincide get a gradient of 0 without a case of their own
ROWS = 512  # rows of the kernel made at once on the CPU: they stay in its cache, and the products are large enough to be fast


class Kernel(Delta):
    """K[j, i] = scale * (|rows[0, j] - cols[0, i]| - |rows[1, j] - cols[1, i]|), sparsified.

    rows [2, out, rank / 2] and cols [2, in, rank / 2] are float32. Only the factors, the input and the scalar threshold live from forward to
    backward.
    """

    def __init__(self, shape: tuple[int, int], method: SNELL) -> None:
        super().__init__()
        self.shape, self.method = shape, method
        self.rows = nn.Parameter(torch.empty(2, shape[0], method.rank // 2))
        self.cols = nn.Parameter(torch.empty(2, shape[1], method.rank // 2))
        for factor in (self.rows, self.cols):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows and ``scale`` times their two distances, [2, rows, in], from |r|^2 + |c|^2 - 2 r.c as one product."""
        rows, cols = self.method.scale * self.rows.detach(), self.method.scale * self.cols.detach()
        right = torch.cat([cols, torch.ones_like(cols[..., :1]), cols.square().sum(-1, keepdim=True)], -1).mT
        left = torch.cat([-2 * rows, rows.square().sum(-1, keepdim=True), torch.ones_like(rows[..., :1])], -1)
        step = ROWS if rows.device.type == "cpu" else len(left[0])
        for start in range(0, left.shape[1], step):
            block = slice(start, start + step)
            yield block, (left[:, block] @ right).clamp_min_(TINY).sqrt_()

    def kernel(self) -> Tensor:
        """K, [out, in], without gradient."""
        out = self.rows.new_empty(self.shape)
        for block, distance in self._blocks():
            torch.sub(distance[0], distance[1], out=out[block])
        return out

    def threshold(self, kernel: Tensor) -> Tensor:
        """The largest magnitude that is set to zero: an order statistic with the same support as the interpolated quantile."""
        if not self.method.sparsity:
            return kernel.new_zeros(())
        return kth_smallest(kernel.abs(), int(self.method.sparsity * (kernel.numel() - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        change = torch.zeros(self.shape, dtype=self.rows.dtype, device=self.rows.device)
        self._add(change, 1.0, ())
        return change

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, kept: Kept = ()) -> Kept:
        return self._add(weight, self.gate, kept)

    @torch.no_grad()
    def _add(self, weight: Tensor, gate: float, kept: Kept) -> Kept:
        """The first call forms the whole kernel to find the threshold, which later calls are given."""
        if self.method.plain:
            weight.add_(self.kernel(), alpha=gate)
            return ()
        if kept:
            for block, distance in self._blocks():
                self._add_block(weight[block], distance[0].sub_(distance[1]), gate, kept[0].item())
            return kept
        kernel = self.kernel()
        cut = self.threshold(kernel)
        for start in range(0, len(kernel), ROWS):
            self._add_block(weight[start : start + ROWS], kernel[start : start + ROWS], gate, cut.item())
        return (cut,)

    def _add_block(self, weight: Tensor, kernel: Tensor, gate: float, cut: float) -> None:
        factor = kernel.abs()
        factor = factor.sub_(cut).relu_() if self.method.sparsifier == "paper" else F.threshold(factor, cut, 0.0, inplace=True)
        weight.addcmul_(kernel, factor, value=gate)

    @torch.no_grad()
    def pull(self, grad: WeightGrad, original: Tensor, kept: Kept) -> tuple[Tensor | None, ...]:
        """dL/drow_j = sum_i e_ji (row_j - col_i) with e = dL/dK / distance, and likewise for the columns, with both signs."""
        slopes = grad.dense
        grad_rows, grad_cols = torch.empty_like(self.rows), torch.zeros_like(self.cols)
        cols = torch.cat([self.cols, torch.ones_like(self.cols[..., :1])], -1)
        rows = torch.cat([self.rows, torch.ones_like(self.rows[..., :1])], -1)
        for block, distance in self._blocks():
            share = torch.div(self._slope(slopes[block], distance, kept), distance, out=distance)
            by_row, by_col = share @ cols, share.mT @ rows[:, block]
            grad_rows[:, block] = self.rows[:, block] * by_row[..., -1:] - by_row[..., :-1]
            grad_cols += self.cols * by_col[..., -1:] - by_col[..., :-1]
        # one scale from K = scale * difference, one because the distances come with it
        signs = self.rows.new_tensor([1.0, -1.0]).view(2, 1, 1) * self.gate * self.method.scale**2
        return grad_rows.mul_(signs), grad_cols.mul_(signs)

    def _slope(self, grad: Tensor, distance: Tensor, kept: Kept) -> Tensor:
        """dL/dK from dL/dchange."""
        if self.method.plain:
            return grad
        factor, cut = torch.sub(distance[0], distance[1]).abs_(), kept[0].item()
        factor = (
            F.threshold(factor.mul_(2).sub_(cut), cut, 0.0, inplace=True)
            if self.method.sparsifier == "paper"
            else F.threshold(factor, cut, 0.0, inplace=True)
        )
        return factor.mul_(grad)

    @property
    def additive(self) -> bool:
        """The branch stands alone only while its own dropout or drop path is drawn."""
        return self.training and bool(self.method.dropout or self.method.drop_path)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        y = changed_linear(F.dropout(x, self.method.dropout), torch.zeros_like(weight), None, [self])
        kept = torch.rand(len(y), *[1] * (y.ndim - 1), device=y.device) >= self.method.drop_path
        return y * kept / (1 - self.method.drop_path)


@register("snell")
@dataclass(frozen=True)
class SNELL(Reparam):
    """SNELL: a thresholded difference of distances between small factors."""

    rank: Annotated[int, Ge(2), MultipleOf(2)] = 32
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.9
    sparsifier: Literal["released", "paper"] = "released"
    scale: Annotated[float, Gt(0)] = 0.1
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.0
    class_token: bool = True

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = "two factors a layer; their kernel, thresholded, changes the weight"
    paper: ClassVar[str] = "arXiv 2411.01800"
    neutral_start: ClassVar[bool] = False

    @property
    def plain(self) -> bool:
        """The released code's switch at sparsity 0: the change is K itself."""
        return self.sparsifier == "released" and self.sparsity == 0

    def delta(self, site: Site) -> Kernel:
        return Kernel(site.shape, self)

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = super().build(model)
        tokens = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "cls_token"]
        if self.class_token and tokens:
            state["class_token"] = InPlace(model, tokens, keep=True)
        return state
