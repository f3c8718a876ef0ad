"""SpIEL: drop the entries that changed least, grow others by their gradients (Ansell et al., 2024, arXiv 2401.16405).

Read from the released code. Every ``schedule.every`` steps (S) each matrix swaps part of its k entries, ``window`` steps (g) into the period: before
steps g, S + g, 2 S + g, ... The share is ``schedule.rate`` with its decay; under the linear one all k go the first time. The smallest |change| goes,
as in the code; the abstract has the change of magnitude. ``score``, ``direction`` and ``scope`` choose the first entries only.

    ag  Accumulated gradients. The first micro-batch of a period gives each matrix k candidates (the abstract: "a few"), the largest |g|, whose
        gradients are summed over the g steps. The largest |sum| come in, with the age g and the moments that Adam has after g steps of the mean
        gradient and the mean square; every entry has a bias correction of its own age. What would leave and come in stays untouched.
    ma  Momentum approximation, with ``optimizer=sm3``: of the untrained entries the largest products of SM3's row and column accumulators come in. As
        in the code a row without a trained entry has the accumulator 0, so nothing grows there while other products are left, and so with columns.

Squares are those of a step's gradient, over all its micro-batches and processes, so that their number does not matter; in the code they are those of
micro-batches, and accumulation makes the seeds too small. Gradients are taken before clipping. Weight decay pulls towards the pretrained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ...core.method import Run
from ...core.sparse.bank import Bank
from ...core.sparse.candidates import Candidates
from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.select import TopK
from ...errors import ConfigError
from ...registry import register
from ...schedules.drop_grow import DropGrow

Best = Callable[
    [Tensor, int], Tensor
]  # of the entries that are kept, and how many may come in: the best of the others, best first


def swap(where: Tensor, change: Tensor, share: float, best: Best) -> Tensor:
    """The entries of a site afterwards, ascending, as many as before: ``share`` of them, rounded down, gives way if there are others.

    If fewer come in than could leave, the smallest changes leave.
    """
    n, order = int(share * len(where)), change.abs().sort(stable=True).indices
    offered, kept = where[order[:n]], where[order[n:]]
    grown = best(kept, n)
    leaving = offered[~torch.isin(offered, grown)]
    new = len(grown) - (n - len(leaving))
    return torch.cat([kept, grown, leaving[new:]]).sort().values


@register("spiel")
@dataclass(frozen=True)
class SpIEL(Sparse):
    """SpIEL: a moving set of entries; those that changed least give way to those with the largest gradients."""

    criterion: Literal["ag", "ma"] = "ag"
    schedule: Schedule = DropGrow(every=20)
    window: Annotated[int, Ge(1)] = 5

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = (
        "entries that move: the least changed are dropped, those with large gradients grown"
    )
    paper: ClassVar[str] = "arXiv 2401.16405"

    def contradictions(self) -> list[str]:
        return [*super().contradictions(), *self._unfit()]

    def _unfit(self) -> Iterator[str]:
        if self.schedule.name != "drop_grow":
            yield f"schedule={self.schedule.name} does not say when entries are dropped and grown; take schedule=drop_grow, or method=sparse."
        elif self.window >= self._moves.every:
            yield f"method.window={self.window} must end before its period does; take less than schedule.every={self._moves.every}."
        if self.score == "change":
            yield "method.score=change is 0 everywhere before training, and the first entries are chosen by it; take another score."
        if self.grain != "element":
            yield f"method.grain={self.grain}: entries are dropped and grown one by one; take grain=element, or method=sparse."

    def faults(self, steps: int) -> list[str]:
        if self.window < steps:
            return []
        return [
            f"method.window={self.window} does not end before the run's {steps} steps do, so nothing would ever move; take less."
        ]

    @property
    def _moves(self) -> DropGrow:
        return cast(DropGrow, self.schedule)

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = super().build(model)
        bank = cast(Bank, state["bank"])
        bank.ages = self.criterion == "ag"
        state["candidates"] = Candidates(len(bank.sizes))
        return state

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        if self.criterion == "ma" and "row.0" not in run.optimizer.state.get(state["bank"].values, {}):
            raise ConfigError(
                "method.criterion=ma grows by the accumulators of SM3, which this optimizer has not; take optimizer=sm3, or criterion=ag."
            )
        super().begin(run, state, previous)

    def before_step(self, run: Run, state: Any) -> None:
        if run.step % self._moves.every == self.window:
            self._reselect(run, state["bank"], state["candidates"])
            state["candidates"].resize(0)
        self.prepare_retry(run, state)

    def prepare_retry(self, run: Run, state: Any) -> None:
        bank, candidates, place = state["bank"], state["candidates"], run.step % self._moves.every
        if self.criterion == "ag" and place < self.window and run.step - place + self.window < run.total:
            if place == 0:
                candidates.resize(len(bank.values))
            candidates.begin_step(bank)
            bank.watch = lambda i, grad: candidates.add_gradient(run, bank, i, grad)

    def after_backward(self, run: Run, state: Any) -> None:
        if state["bank"].watch is not None:
            state["bank"].watch = None
            state["candidates"].end_step(run)

    @torch.no_grad()
    def _reselect(self, run: Run, bank: Bank, candidates: Candidates) -> None:
        first = run.step == self.window and self._moves.decay == "linear"
        share = 1.0 if first else self._moves.replaced(run.step, run.total)
        found = []
        for i in range(len(bank.sizes)):
            best = (
                self._summed(bank, candidates, i) if self.criterion == "ag" else self._products(run, bank, i)
            )
            found.append(run.agree(swap(bank.where(i), bank.slice(i), share, best)))
        betas = run.optimizer.param_groups[0].get(
            "betas", (0.0, 0.0)
        )  # an optimizer without them takes no seeds
        fresh = bank.revise(
            found, run.moments(bank.values), self._moves.dropped, candidates.seeds(bank, found, betas)
        )
        run.log(churn=len(fresh) / max(1, bank.active), trained=float(bank.active))

    @staticmethod
    def _summed(bank: Bank, candidates: Candidates, i: int) -> Best:
        index, sums, _, _ = candidates.at_site(bank, i)
        ranked = index[sums.abs().sort(descending=True, stable=True).indices]
        return lambda kept, n: ranked[~torch.isin(ranked, kept)][:n]

    @staticmethod
    def _products(run: Run, bank: Bank, i: int) -> Best:
        """Of the square roots, which overflow and vanish later and have the same order."""
        held = run.optimizer.state[bank.values]
        untrained = torch.ones(bank.sizes[i], dtype=torch.bool, device=bank.index.device).index_fill_(
            0, bank.where(i).long(), False
        )

        def best(kept: Tensor, n: int) -> Tensor:
            top = TopK(n, {i: 1})
            top.add(i, (held[f"row.{i}"].sqrt() * held[f"col.{i}"].sqrt()).float(), untrained)
            return top.take()[i]

        return best
