"""The thresholded kernel change of SNELL (arXiv 2411.01800) and of methods built on it.

The matrix of the change is a difference of distances between the rows of small factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt, MultipleOf
from torch import Tensor, nn
from torch.nn import functional as F

from .attach import patched
from .inplace import train_class_token
from .layer import changed_linear
from .linalg import kth_smallest
from .method import Reparam, Run
from .part import Cache, Delta, WeightGrad

TINY = 1e-12  # lower bound of squared distances: rows that coincide then get a gradient of 0
# Rows or columns of the kernel that the CPU forms at once, so that a block of them fits into the cache.
BLOCK = 512

BlockIndex = tuple[slice, slice]


@dataclass(frozen=True)
class Kernelized(Reparam):
    """Base of the methods whose delta is a ``Kernel``.

    Options:
        rank: Number of columns of the factors, summed over both distances.
        sparsity: Share of the entries of each change that is set to zero.
        sparsifier: How the kernel K becomes the change, with the threshold t. ``released`` (the authors'
            code) is K |K| where |K| > t, with |K| constant in the gradient; ``paper`` (eq. 5) is
            K max(|K| - t, 0).
        scale: Factor of the distances.
        dropout: Dropout of the layer's input, for the change only.
        drop_path: Probability that the change is left out for an example.
        class_token: Also train the class token in place, if the model has one.
        class_token_decay: Whether weight decay acts on the trained class token.
    """

    rank: Annotated[int, Ge(2), MultipleOf(2)] = 32
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.9
    sparsifier: Literal["released", "paper"] = "released"
    scale: Annotated[float, Gt(0)] = 0.1
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.0
    class_token: bool = True
    class_token_decay: bool = False

    size: ClassVar[str] = "rank"

    @property
    def plain(self) -> bool:
        """Tell whether the change is K itself, without threshold."""
        return False

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = super().build(model)
        token = train_class_token(model, self.class_token_decay) if self.class_token else None
        if token is not None:
            state["class_token"] = token
        return state

    @torch.no_grad()
    def check_trained(self, run: Run, state: Any) -> list[str]:
        """Compare the zeros of the changes with ``sparsity``. Several entries may equal the threshold."""
        if not self.sparsity or not self.meets_target(run.step, run.total):
            return []
        size = zeros = count = 0
        for layer in patched(run.model).values():
            for delta in layer.deltas:
                if isinstance(delta, Kernel):
                    change = delta(layer.original)
                    size += change.numel()
                    zeros += int((change == 0).sum())
                    count += 1
        requested = self.sparsity * size
        if not size or -count <= zeros - requested <= count + 0.01 * size:
            return []
        return [
            f"{zeros} entries of the change are 0, but method.sparsity={self.sparsity:g} "
            f"asks for {requested:.0f}"
        ]


class Kernel(Delta):
    """K[j, i] = scale * (|rows[0, j] - cols[0, i]| - |rows[1, j] - cols[1, i]|), sparsified.

    ``rows`` [2, out, rank / 2] and ``cols`` [2, in, rank / 2] are float32. From forward to backward only the
    factors, the layer's input and the scalar threshold stay in memory.
    """

    keeps_zeros = True  # ``linear`` forms the change, and the layer masks it
    across = False  # whether a block is a range of columns of K instead of rows

    def __init__(self, shape: tuple[int, int], method: Kernelized) -> None:
        super().__init__()
        self.shape, self.method = shape, method
        self.rows = nn.Parameter(torch.empty(2, shape[0], method.rank // 2))
        self.cols = nn.Parameter(torch.empty(2, shape[1], method.rank // 2))
        for factor in (self.rows, self.cols):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def _blocks(self) -> Iterator[tuple[BlockIndex, Tensor]]:
        """Yield each block of K: its place, and ``scale`` times its two distances, [2, *block].

        The squared distance |r|^2 + |c|^2 - 2 r.c is computed as one matrix product.
        """
        rows, cols = self.method.scale * self.rows.detach(), self.method.scale * self.cols.detach()
        right = torch.cat([cols, torch.ones_like(cols[..., :1]), cols.square().sum(-1, keepdim=True)], -1).mT
        left = torch.cat([-2 * rows, rows.square().sum(-1, keepdim=True), torch.ones_like(rows[..., :1])], -1)
        size = self.shape[self.across]
        step = BLOCK if rows.device.type == "cpu" else size
        for start in range(0, size, step):
            rows_at, cols_at = slice(start, start + step), slice(None)
            if self.across:
                rows_at, cols_at = cols_at, rows_at
            yield (rows_at, cols_at), (left[:, rows_at] @ right[..., cols_at]).clamp_min_(TINY).sqrt_()

    def _difference(self, distance: Tensor, out: Tensor | None = None) -> Tensor:
        """Return K of a block from its two distances."""
        return torch.sub(distance[0], distance[1], out=out)

    def kernel(self) -> Tensor:
        """Return K, [out, in], without gradient."""
        out = self.rows.new_empty(self.shape)
        for at, distance in self._blocks():
            self._difference(distance, out[at])
        return out

    def threshold(self, kernel: Tensor) -> Tensor:
        """Return the largest magnitude that is set to zero, as a scalar.

        It is an order statistic; an interpolated quantile would set the same entries to zero.
        """
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
    def add_(self, weight: Tensor, original: Tensor, gate: float, cache: Cache = ()) -> Cache:
        return self._add(weight, gate, cache)

    @torch.no_grad()
    def _add(self, weight: Tensor, gate: float, cache: Cache) -> Cache:
        """Add the change. Without a cached threshold the whole kernel is formed to find it."""
        if self.method.plain:
            weight.add_(self.kernel(), alpha=gate)
            return ()
        if cache:
            for at, distance in self._blocks():
                self._add_block(weight[at], self._difference(distance, distance[0]), gate, cache[0].item())
            return cache
        kernel = self.kernel()
        cut = self.threshold(kernel)
        for start in range(0, len(kernel), BLOCK):
            self._add_block(weight[start : start + BLOCK], kernel[start : start + BLOCK], gate, cut.item())
        return (cut,)

    def _add_block(self, weight: Tensor, kernel: Tensor, gate: float, cut: float) -> None:
        """Add the sparsified kernel of one block to the same block of the weight."""
        factor = kernel.abs()
        if self.method.sparsifier == "paper":
            factor.sub_(cut).relu_()
        else:
            F.threshold(factor, cut, 0.0, inplace=True)
        weight.addcmul_(kernel, factor, value=gate)

    @torch.no_grad()
    def pull(
        self, grad: WeightGrad, original: Tensor, gate: float, cache: Cache
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the factors: dL/drow_j = sum_i e_ji (row_j - col_i).

        The gradients of the columns have the same form. e is dL/dK divided by the distance. The second
        distance enters with the opposite sign.
        """
        slopes = grad.dense
        grads = [torch.zeros_like(p) for p in self.inputs()]
        cols = torch.cat([self.cols, torch.ones_like(self.cols[..., :1])], -1)
        rows = torch.cat([self.rows, torch.ones_like(self.rows[..., :1])], -1)
        for at, distance in self._blocks():
            (j, i), slope = at, self._slope(slopes[at], distance, cache, grads[2:])
            share = torch.div(slope, distance, out=distance)
            by_row, by_col = share @ cols[:, i], share.mT @ rows[:, j]
            grads[0][:, j] += self.rows[:, j] * by_row[..., -1:] - by_row[..., :-1]
            grads[1][:, i] += self.cols[:, i] * by_col[..., -1:] - by_col[..., :-1]
        # K contains one factor ``scale``. The other undoes the division by distances that contain it.
        signs = self.rows.new_tensor([1.0, -1.0]).view(2, 1, 1) * gate * self.method.scale**2
        return grads[0].mul_(signs), grads[1].mul_(signs), *(g.mul_(gate) for g in grads[2:])

    def _slope(self, grad: Tensor, distance: Tensor, cache: Cache, more: list[Tensor]) -> Tensor:
        """Return dL/d(distance[0] - distance[1]) of a block, given dL/dchange.

        A subclass with further trained tensors adds their gradients to ``more``.
        """
        if self.method.plain:
            return grad
        return self._slope_of(self._difference(distance), cache).mul_(grad)

    def _slope_of(self, kernel: Tensor, cache: Cache) -> Tensor:
        """Overwrite K with dchange/dK."""
        factor, cut = kernel.abs_(), cache[0].item()
        if self.method.sparsifier == "paper":
            factor.mul_(2).sub_(cut)
        return F.threshold(factor, cut, 0.0, inplace=True)

    @property
    def additive(self) -> bool:
        """Tell whether dropout or drop path is active; if so, the change is applied beside the layer."""
        return self.training and bool(self.method.dropout or self.method.drop_path)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        y = changed_linear(F.dropout(x, self.method.dropout), torch.zeros_like(weight), None, [self], [1.0])
        survives = torch.rand(len(y), *[1] * (y.ndim - 1), device=y.device) >= self.method.drop_path
        return y * survives / (1 - self.method.drop_path)
