"""SM3: squared gradients by rows and columns only (Anil et al., 2019, arXiv 1901.11150, its second algorithm)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..core.state import EntryStore


class SM3(torch.optim.Optimizer):
    """v = the least of an entry's accumulators + g^2; each accumulator becomes the largest v among its entries; p -= lr * g / sqrt(v + eps).

    A matrix has an accumulator for every row and every column, any other tensor one for every index of every dimension: for vectors this is Adagrad.
    The values of a bank are entries of its sites: ``state[bank.values]`` has ``row.i`` [out, 1] and ``col.i`` [1, in] for site i, from the start, and
    they stay when entries move. Nothing lowers an accumulator. No momentum. Weight decay is decoupled, as in AdamW.
    """

    def __init__(self, params: Any, lr: float, eps: float = 1e-8, banks: Iterable[EntryStore] = ()) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": 0.0})
        self.banks: dict[Tensor, EntryStore] = {bank.values: bank for bank in banks}
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = _of_bank(self.banks[p]) if p in self.banks else _of_dense(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is nothing to evaluate again
        """Move everything that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                move = self._move_bank if p in self.banks else self._move
                move(p, p.grad, self.state[p], group["lr"], group["eps"])

    def _move(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, eps: float) -> None:
        v = reduce(torch.minimum, state.values())
        v = torch.addcmul(v, grad, grad)
        for accumulator in state.values():
            others = [d for d in range(v.ndim) if accumulator.shape[d] != v.shape[d]]
            torch.maximum(accumulator, v.amax(others, keepdim=True) if others else v, out=accumulator)
        p.addcdiv_(grad, v.add_(eps).sqrt_(), value=-lr)

    def _move_bank(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, eps: float) -> None:
        bank = self.banks[p]
        for i, (a, b) in enumerate(zip(bank.bounds(), bank.bounds()[1:], strict=False)):
            if a == b:
                continue
            at, g = bank.where(i).long(), grad[a:b]
            sums = state[f"row.{i}"].view(-1), state[f"col.{i}"].view(-1)
            width = len(sums[1])
            places = at // width, at % width
            v = torch.minimum(sums[0][places[0]], sums[1][places[1]]).addcmul_(g, g)
            for accumulator, place in zip(sums, places, strict=True):
                accumulator.scatter_reduce_(0, place, v, "amax")
            p[a:b].addcdiv_(g, v.add_(eps).sqrt_(), value=-lr)


def _of_dense(p: Tensor) -> dict[str, Tensor]:
    shapes = [[n if d == e else 1 for e, n in enumerate(p.shape)] for d in range(p.ndim)] or [[]]
    return {f"cover.{d}": p.new_zeros(shape) for d, shape in enumerate(shapes)}


def _of_bank(bank: EntryStore) -> dict[str, Tensor]:
    rows = {f"row.{i}": bank.values.new_zeros(out, 1) for i, (out, _) in enumerate(bank.shapes)}
    return rows | {f"col.{i}": bank.values.new_zeros(1, in_) for i, (_, in_) in enumerate(bank.shapes)}
