"""Candidates of SpIEL (arXiv 2401.16405): entries that may be trained next, with sums of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..method import Run
from ..part import WeightGrad
from ..state import StateModule
from .bank import Bank
from .select import TopK


class Candidates(StateModule):
    """The candidates of all sites, in the order of the bank's slots: one for each trained entry.

    It is empty while no gradients are collected. The tensors are part of a checkpoint, but not of the stored
    change.
    """

    index: Tensor  # [capacity] int32: flat positions, ascending within a site
    sums: Tensor  # [capacity] float32: sums of the gradients of the steps
    squares: Tensor  # [capacity] float32: sums of their squares
    steps: Tensor  # [sites] int64: how many steps were summed; 0: the site has no candidates yet

    def __init__(self, sites: int) -> None:
        super().__init__()
        for name, dtype in (("index", torch.int32), ("sums", torch.float32), ("squares", torch.float32)):
            self.register_buffer(name, torch.zeros(0, dtype=dtype))
        self.register_buffer("steps", torch.zeros(sites, dtype=torch.int64))
        # [capacity]: the gradient of the current step; None between steps.
        self.step_sums: Tensor | None = None
        self.arrived: set[int] = set()  # sites that got a gradient in the current step
        self.chosen: set[int] = set()  # sites that have candidates

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Resize before loading, because a checkpoint may hold candidates or none."""
        self.resize(len(state_dict.get(f"{prefix}index", self.index)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def pack(self) -> dict[str, Tensor]:
        """Return nothing: candidates are not part of the stored change."""
        return {}

    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Take nothing from a stored change."""

    def resize(self, size: int) -> None:
        """Forget all candidates, and make room for ``size``."""
        self.index, self.sums = self.index.new_zeros(size), self.sums.new_zeros(size)
        self.squares = self.squares.new_zeros(size)
        self.steps.zero_()

    def begin_step(self, bank: Bank) -> None:
        """Prepare for the gradients of a step."""
        self.step_sums, self.arrived = torch.zeros_like(bank.values.data), set()
        self.chosen = {i for i, steps in enumerate(self.steps.tolist()) if steps}

    @torch.no_grad()
    def add_gradient(self, run: Run, bank: Bank, i: int, grad: WeightGrad) -> None:
        """Add the gradient of site ``i`` of one micro-batch to the current step.

        The first gradient of a site chooses its candidates: the entries with the largest absolute gradient.
        """
        assert self.step_sums is not None
        start, end = bank.bounds()[i : i + 2]
        if i not in self.chosen:
            top = TopK(end - start, {i: 1})
            # Selection raises an error for NaN; a loss that is not finite is reported elsewhere.
            scores = run.average_or_broadcast(grad.dense).abs().nan_to_num_().float()
            pruned = bank.pruned(i)
            top.add(i, scores, None if pruned is None else ~pruned)
            self.index[start:end] = top.take()[i]
            self.chosen.add(i)
        self.step_sums[start:end] += grad.dense.reshape(-1)[self.index[start:end].long()]
        self.arrived.add(i)

    @torch.no_grad()
    def end_step(self, run: Run) -> None:
        """Add the step's gradient to the sums, unless its scaled fp16 loss overflowed."""
        assert self.step_sums is not None
        scaler = getattr(run.optimizer, "scaler", None)
        scale = scaler.get_scale() if scaler else 1.0
        grad = run.average_or_broadcast(self.step_sums).div_(scale)
        if scaler is None or grad.isfinite().all():
            self.sums += grad
            self.squares.addcmul_(grad, grad)
            self.steps[sorted(self.arrived)] += 1
        self.step_sums = None

    def at_site(self, bank: Bank, i: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return index, sums, squares and number of steps of a site; empty if it has no candidates."""
        start, end = 0, 0
        if len(self.index) and self.steps[i]:
            start, end = bank.bounds()[i : i + 2]
        return self.index[start:end], self.sums[start:end], self.squares[start:end], int(self.steps[i])

    def seeds(self, bank: Bank, found: list[Tensor], betas: tuple[float, float]) -> dict[str, Tensor]:
        """Return Adam's ``step``, ``exp_avg`` and ``exp_avg_sq`` for newly trained entries, each [capacity].

        ``found``: the entries that each site trains next, ascending. A candidate with n summed steps gets the
        age n, and moments whose bias-corrected values are the mean gradient and the mean square. All other
        entries get 0.

            exp_avg = (1 - beta1^n) sum(g) / n,  exp_avg_sq = (1 - beta2^n) sum(g^2) / n
        """
        seeds = {name: torch.zeros_like(bank.values.data) for name in ("step", "exp_avg", "exp_avg_sq")}
        offset = 0
        for i, chosen in enumerate(found):
            index, sums, squares, steps = self.at_site(bank, i)
            new = torch.isin(index, chosen)
            slots = offset + torch.searchsorted(chosen, index[new])
            seeds["step"][slots] = float(steps)
            for name, total, beta in (("exp_avg", sums, betas[0]), ("exp_avg_sq", squares, betas[1])):
                seeds[name][slots] = total[new] * ((1 - beta**steps) / max(1, steps))
            offset += len(chosen)
        return seeds
