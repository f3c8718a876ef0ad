"""SM3: accumulate squared gradients by rows and columns (Anil et al., 2019, arXiv 1901.11150, SM3-II)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor, nn

from ..core.optimizer import Optimizer
from ..core.state import EntryStore, entry_stores
from ..registry import register


@register("sm3")
@dataclass(frozen=True)
class SM3(Optimizer):
    """SM3: one accumulator per row and per column instead of one per entry.

    Options:
        eps: Number added to the accumulated squares before taking the square root.
    """

    eps: Annotated[float, Gt(0)] = 1e-8

    former: ClassVar[dict[str, Any]] = {"betas": [0.9, 0.999]}

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> SM3Optimizer:
        """Return the torch optimizer, which knows the row and column of every entry in a bank."""
        return SM3Optimizer(groups, self.lr, self.eps, entry_stores(states))


class SM3Optimizer(torch.optim.Optimizer):
    """The SM3 update: v = the smallest accumulator of an entry + g^2, then p -= lr * g / sqrt(v + eps).

    Each accumulator then rises to the largest v among its entries; accumulators never fall. A matrix has an
    accumulator for every row and every column; any other tensor has one for every index of every dimension,
    so vectors are updated as in Adagrad. The values of a bank are entries of its sites, so
    ``state[bank.values]`` holds ``row.i`` [out, 1] and ``col.i`` [1, in] for each site i from the start. They
    are kept when entries move. There is no momentum. Weight decay is decoupled, as in AdamW.
    """

    def __init__(self, params: Any, lr: float, eps: float = 1e-8, banks: Iterable[EntryStore] = ()) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": 0.0})
        self.banks: dict[Tensor, EntryStore] = {bank.values: bank for bank in banks}
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.banks:
                    self.state[p] = _bank_state(self.banks[p])
                else:
                    self.state[p] = _dense_state(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is evaluated again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._update_bank if p in self.banks else self._update_dense
                update(p, p.grad, self.state[p], group["lr"], group["eps"])

    def _update_dense(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, eps: float) -> None:
        v = reduce(torch.minimum, state.values())
        v = torch.addcmul(v, grad, grad)
        for accumulator in state.values():
            others = [d for d in range(v.ndim) if accumulator.shape[d] != v.shape[d]]
            largest = v
            if others:
                largest = v.amax(others, keepdim=True)
            torch.maximum(accumulator, largest, out=accumulator)
        p.addcdiv_(grad, v.add_(eps).sqrt_(), value=-lr)

    def _update_bank(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, eps: float) -> None:
        bank = self.banks[p]
        bounds = bank.bounds()
        for i, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                continue
            positions, g = bank.positions(i).long(), grad[start:end]
            rows, columns = state[f"row.{i}"].view(-1), state[f"col.{i}"].view(-1)
            width = len(columns)
            row, column = positions // width, positions % width
            v = torch.minimum(rows[row], columns[column]).addcmul_(g, g)
            rows.scatter_reduce_(0, row, v, "amax")
            columns.scatter_reduce_(0, column, v, "amax")
            p[start:end].addcdiv_(g, v.add_(eps).sqrt_(), value=-lr)


def _dense_state(p: Tensor) -> dict[str, Tensor]:
    """Return one accumulator of 0 for each dimension, with size 1 in every other dimension."""
    if not p.ndim:
        return {"cover.0": p.new_zeros([])}
    state = {}
    for dimension, size in enumerate(p.shape):
        shape = [1] * p.ndim
        shape[dimension] = size
        state[f"cover.{dimension}"] = p.new_zeros(shape)
    return state


def _bank_state(bank: EntryStore) -> dict[str, Tensor]:
    """Return row and column accumulators of 0 for every site of ``bank``."""
    state = {}
    for i, (rows, _) in enumerate(bank.shapes):
        state[f"row.{i}"] = bank.values.new_zeros(rows, 1)
    for i, (_, columns) in enumerate(bank.shapes):
        state[f"col.{i}"] = bank.values.new_zeros(1, columns)
    return state
