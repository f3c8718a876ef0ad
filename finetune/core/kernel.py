"""A change of a weight made of distances between the rows of two small factors, and thresholded: SNELL's, and a building block of others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt, MultipleOf
from torch import Tensor, nn
from torch.nn import functional as F

from .inplace import InPlace
from .linalg import kth_smallest
from .method import Reparam, Run
from .part import Delta, Kept, WeightGrad, changed_linear, patched

TINY = 1e-12  # the least squared distance: rows that coincide get a gradient of 0 without a case of their own
BLOCK = 512  # rows or columns of the kernel made at once on the CPU: they stay in its cache, and the products are large enough to be fast

At = tuple[slice, slice]


@dataclass(frozen=True)
class Kernelized(Reparam):
    """Base of the methods whose delta is a ``Kernel``. Their class token, where a model has one, is trained too, in place."""

    rank: Annotated[int, Ge(2), MultipleOf(2)] = 32
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.9
    sparsifier: Literal["released", "paper"] = "released"
    scale: Annotated[float, Gt(0)] = 0.1
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.0
    class_token: bool = True

    size: ClassVar[str] = "rank"

    @property
    def plain(self) -> bool:
        """Whether the change is K itself."""
        return False

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = super().build(model)
        tokens = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "cls_token"]
        if self.class_token and tokens:
            state["class_token"] = InPlace(model, tokens, keep=True)
        return state

    @torch.no_grad()
    def check_trained(self, run: Run, state: Any) -> list[str]:
        """Count the entries of the kernels' changes that are 0. Equal ones at the threshold may be 0 together."""
        if not self.sparsity or not self.ready(run.step, run.total):
            return []
        size = zeros = count = 0
        for layer in patched(run.model).values():
            for delta in layer.deltas:
                if isinstance(delta, Kernel):
                    change = delta(layer.original)
                    size, zeros, count = size + change.numel(), zeros + int((change == 0).sum()), count + 1
        requested = self.sparsity * size
        if not size or -count <= zeros - requested <= count + 0.01 * size:
            return []
        return [
            f"{zeros} entries of the change are 0, but method.sparsity={self.sparsity:g} asks for {requested:.0f}"
        ]


class Kernel(Delta):
    """K[j, i] = scale * (|rows[0, j] - cols[0, i]| - |rows[1, j] - cols[1, i]|), sparsified.

    rows [2, out, rank / 2] and cols [2, in, rank / 2] are float32. Only the factors, the input and the scalar threshold live from forward to
    backward.
    """

    across = False  # whether blocks are made of whole columns of K instead of whole rows

    def __init__(self, shape: tuple[int, int], method: Kernelized) -> None:
        super().__init__()
        self.shape, self.method = shape, method
        self.rows = nn.Parameter(torch.empty(2, shape[0], method.rank // 2))
        self.cols = nn.Parameter(torch.empty(2, shape[1], method.rank // 2))
        for factor in (self.rows, self.cols):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def _blocks(self) -> Iterator[tuple[At, Tensor]]:
        """Blocks of K and ``scale`` times their two distances, [2, *block], from |r|^2 + |c|^2 - 2 r.c as one product."""
        rows, cols = self.method.scale * self.rows.detach(), self.method.scale * self.cols.detach()
        right = torch.cat([cols, torch.ones_like(cols[..., :1]), cols.square().sum(-1, keepdim=True)], -1).mT
        left = torch.cat([-2 * rows, rows.square().sum(-1, keepdim=True), torch.ones_like(rows[..., :1])], -1)
        size = self.shape[self.across]
        step = BLOCK if rows.device.type == "cpu" else size
        for start in range(0, size, step):
            part, whole = slice(start, start + step), slice(None)
            at = (whole, part) if self.across else (part, whole)
            yield at, (left[:, at[0]] @ right[..., at[1]]).clamp_min_(TINY).sqrt_()

    def _difference(self, distance: Tensor, out: Tensor | None = None) -> Tensor:
        """K of a block."""
        return torch.sub(distance[0], distance[1], out=out)

    def kernel(self) -> Tensor:
        """K, [out, in], without gradient."""
        out = self.rows.new_empty(self.shape)
        for at, distance in self._blocks():
            self._difference(distance, out[at])
        return out

    def threshold(self, kernel: Tensor) -> Tensor:
        """The largest magnitude that is set to zero: an order statistic with the same support as the interpolated quantile."""
        if not self.method.sparsity:
            return kernel.new_zeros(())
        return kth_smallest(kernel.abs(), int(self.method.sparsity * (kernel.numel() - 1)))

    def describe(self) -> str:
        return "a kernel change"

    def forward(self, weight: Tensor) -> Tensor:
        change = torch.zeros(self.shape, dtype=self.rows.dtype, device=self.rows.device)
        self._add(change, 1.0, ())
        return change

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, gate: float, kept: Kept = ()) -> Kept:
        return self._add(weight, gate, kept)

    @torch.no_grad()
    def _add(self, weight: Tensor, gate: float, kept: Kept) -> Kept:
        """The first call forms the whole kernel to find the threshold, which later calls are given."""
        if self.method.plain:
            weight.add_(self.kernel(), alpha=gate)
            return ()
        if kept:
            for at, distance in self._blocks():
                self._add_block(weight[at], self._difference(distance, distance[0]), gate, kept[0].item())
            return kept
        kernel = self.kernel()
        cut = self.threshold(kernel)
        for start in range(0, len(kernel), BLOCK):
            self._add_block(weight[start : start + BLOCK], kernel[start : start + BLOCK], gate, cut.item())
        return (cut,)

    def _add_block(self, weight: Tensor, kernel: Tensor, gate: float, cut: float) -> None:
        factor = kernel.abs()
        factor = (
            factor.sub_(cut).relu_()
            if self.method.sparsifier == "paper"
            else F.threshold(factor, cut, 0.0, inplace=True)
        )
        weight.addcmul_(kernel, factor, value=gate)

    @torch.no_grad()
    def pull(self, grad: WeightGrad, original: Tensor, gate: float, kept: Kept) -> tuple[Tensor | None, ...]:
        """dL/drow_j = sum_i e_ji (row_j - col_i) with e = dL/dK / distance, and likewise for the columns, with both signs."""
        slopes = grad.dense
        grads = [torch.zeros_like(p) for p in self.inputs()]
        cols = torch.cat([self.cols, torch.ones_like(self.cols[..., :1])], -1)
        rows = torch.cat([self.rows, torch.ones_like(self.rows[..., :1])], -1)
        for at, distance in self._blocks():
            (j, i), slope = at, self._slope(slopes[at], distance, kept, grads[2:])
            share = torch.div(slope, distance, out=distance)
            by_row, by_col = share @ cols[:, i], share.mT @ rows[:, j]
            grads[0][:, j] += self.rows[:, j] * by_row[..., -1:] - by_row[..., :-1]
            grads[1][:, i] += self.cols[:, i] * by_col[..., -1:] - by_col[..., :-1]
        # one scale from K = scale * difference, one because the distances come with it
        signs = self.rows.new_tensor([1.0, -1.0]).view(2, 1, 1) * gate * self.method.scale**2
        return grads[0].mul_(signs), grads[1].mul_(signs), *(g.mul_(gate) for g in grads[2:])

    def _slope(self, grad: Tensor, distance: Tensor, kept: Kept, more: list[Tensor]) -> Tensor:
        """dL/d(distance[0] - distance[1]) of a block from dL/dchange. A subclass with more trained tensors adds their gradients to ``more``."""
        return grad if self.method.plain else self._slope_of(self._difference(distance), kept).mul_(grad)

    def _slope_of(self, kernel: Tensor, kept: Kept) -> Tensor:
        """dchange/dK from K, in its place."""
        factor, cut = kernel.abs_(), kept[0].item()
        factor = factor.mul_(2).sub_(cut) if self.method.sparsifier == "paper" else factor
        return F.threshold(factor, cut, 0.0, inplace=True)

    @property
    def additive(self) -> bool:
        """The branch stands alone only while its own dropout or drop path is drawn."""
        return self.training and bool(self.method.dropout or self.method.drop_path)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        y = changed_linear(F.dropout(x, self.method.dropout), torch.zeros_like(weight), None, [self], [1.0])
        kept = torch.rand(len(y), *[1] * (y.ndim - 1), device=y.device) >= self.method.drop_path
        return y * kept / (1 - self.method.drop_path)
