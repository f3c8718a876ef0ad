"""Entries that may be trained next, and what training sees of their gradients meanwhile."""

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
    """As many entries of each site as it trains, in the order of the bank's slots, and the sums of their gradients. Empty outside of the windows.

    State, but no part of the change that a run stores.
    """

    index: Tensor  # [capacity] int32, ascending within a site
    sums: Tensor  # [capacity], of the steps' gradients
    squares: Tensor  # [capacity], of the steps' squared gradients
    steps: Tensor  # [sites] int64: how many were summed; 0: the site has no candidates yet

    def __init__(self, sites: int) -> None:
        super().__init__()
        for name, dtype in (("index", torch.int32), ("sums", torch.float32), ("squares", torch.float32)):
            self.register_buffer(name, torch.zeros(0, dtype=dtype))
        self.register_buffer("steps", torch.zeros(sites, dtype=torch.int64))
        self.now: Tensor | None = None  # [capacity], of the step under way
        self.seen: set[int] = set()  # sites whose gradient came in the step under way

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """There may be candidates or none."""
        self.resize(len(state_dict.get(f"{prefix}index", self.index)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def pack(self) -> dict[str, Tensor]:
        return {}

    def unpack(self, stored: dict[str, Tensor]) -> None: ...

    def resize(self, size: int) -> None:
        """Start with nothing, in a room of ``size``."""
        self.index, self.sums, self.squares = (
            t.new_zeros(size) for t in (self.index, self.sums, self.squares)
        )
        self.steps.zero_()

    def begin_step(self, bank: Bank) -> None:
        """Make ready for a step's gradients."""
        self.now, self.seen = torch.zeros_like(bank.values.data), set()
        self._chosen = {i for i, steps in enumerate(self.steps.tolist()) if steps}

    @torch.no_grad()
    def see(self, run: Run, bank: Bank, i: int, grad: WeightGrad) -> None:
        """Take what is needed of one micro-batch's gradient of site ``i``."""
        assert self.now is not None
        a, b = bank.bounds()[i : i + 2]
        if i not in self._chosen:
            top = TopK(b - a, {i: 1})
            top.add(
                i, run.agree(grad.dense).abs().nan_to_num_().float()
            )  # a loss that is not finite has its own report
            self.index[a:b] = top.take()[i]
            self._chosen.add(i)
        self.now[a:b] += grad.dense.reshape(-1)[self.index[a:b].long()]
        self.seen.add(i)

    @torch.no_grad()
    def end_step(self, run: Run) -> None:
        """Sum up the step, unless a scaled loss (fp16) overflowed in it."""
        assert self.now is not None
        scaler = getattr(run.optimizer, "scaler", None)
        now = run.agree(self.now).div_(scaler.get_scale() if scaler else 1.0)
        if scaler is None or now.isfinite().all():
            self.sums += now
            self.squares.addcmul_(now, now)
            self.steps[sorted(self.seen)] += 1
        self.now = None

    def of(self, bank: Bank, i: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Site ``i``'s candidates, none if its gradient was never seen: index, sums, squares, steps."""
        a, b = bank.bounds()[i : i + 2] if len(self.index) and self.steps[i] else (0, 0)
        return self.index[a:b], self.sums[a:b], self.squares[a:b], int(self.steps[i])

    def seeds(self, bank: Bank, found: list[Tensor], betas: tuple[float, float]) -> dict[str, Tensor]:
        """Adam's ages and moments [capacity] for those of the ``found`` entries of each site, ascending, that are candidates; 0 for the others.

        With n the steps seen: the age n, and the moments for which the bias-corrected ones are the mean gradient and the mean square.
        """
        seeds = {name: torch.zeros_like(bank.values.data) for name in ("step", "exp_avg", "exp_avg_sq")}
        offset = 0
        for i, chosen in enumerate(found):
            index, sums, squares, steps = self.of(bank, i)
            new = torch.isin(index, chosen)
            at = offset + torch.searchsorted(chosen, index[new])
            seeds["step"][at] = float(steps)
            for name, total, beta in (("exp_avg", sums, betas[0]), ("exp_avg_sq", squares, betas[1])):
                seeds[name][at] = total[new] * ((1 - beta**steps) / max(1, steps))
            offset += len(chosen)
        return seeds
