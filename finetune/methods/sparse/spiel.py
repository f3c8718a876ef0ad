"""SpIEL: train a moving set of entries; those that changed least are replaced by those with large gradients.

Each matrix trains k entries. Once in every period of ``schedule.every`` steps (S) it replaces some of them,
``window`` steps (g) after the start of the period: before steps g, S + g, 2 S + g and so on. The replaced
share is ``schedule.rate`` with its decay; with the linear decay, all k entries are replaced the first time.
The entries with the smallest absolute change are dropped, and one of two criteria chooses the new ones.
``score``, ``direction`` and ``scope`` only choose the first entries.

- ag, accumulated gradients: The first micro-batch of a period gives each matrix k candidates, the entries
  with the largest absolute gradient. Their gradients are summed over the g steps, and those with the largest
  absolute sum are added. They get the age g, and the moments that Adam has after g steps of the mean gradient
  and the mean square. The bias correction of each entry uses its own age. An entry that would be both dropped
  and added is left untouched.
- ma, momentum approximation, with ``optimizer=sm3``: The untrained entries with the largest product of SM3's
  row and column accumulators are added. A row or column without a trained entry has the accumulator 0, so its
  entries are added only when no positive products are left.

Formula:
    dropped: int(p k) entries with the smallest |change|        p = rate (1 - step / total); the first p is 1
    ag: largest |sum of g steps' gradients| among the candidates
        age = g,  m = (1 - beta1^g) mean(gradient),  v = (1 - beta2^g) mean(gradient^2)
    ma: largest row[i] col[j]

Paper: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024, arXiv 2401.16405.

Reading: The abstract and the released code were read; the body of the paper was not available. In the
abstract, entries are dropped by their change in magnitude, and there are a few candidates. The code, like
this file, drops by |change| and has as many candidates as trained entries. Period 20, window 5 and rate 0.2
are the released defaults.

Rate: The released search tries 3e-6 to 1e-4 for the criterion ag and 4e-4 to 2e-3 for ma. The rate of the
paper is unverified.

Differs:
- The gradient of a whole step is squared, over all micro-batches and ranks, so their number does not matter.
  The released code squares the gradient of each micro-batch, and accumulation makes its moments too small.
- From the second window on, the released code sums g + 1 steps but gives the new moments the age g, so the
  first update after an exchange is 4.5 % (g = 5) to 16 % (g = 2) too large. Here g steps are summed.
- Ranks of the released code may choose different entries; here they agree.
- Gradients are taken before clipping.
- The released budget is a share of all parameters, embeddings included, spread over the layers; here it is
  ``sparsity`` of the layers' entries.

Cost: K trained values, their gradients and two moments in Adam, and one age per value; with SM3,
in + out accumulators per layer. During a window, also the positions and two sums of K candidates. Values and
positions are stored.
"""

from __future__ import annotations

from collections.abc import Callable
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

# Takes the entries that stay and a number n; returns at most n other entries, the best first.
Ranking = Callable[[Tensor, int], Tensor]


def exchange_entries(where: Tensor, change: Tensor, share: float, ranking: Ranking) -> Tensor:
    """Exchange a ``share`` of the entries of a site, rounded down; return as many as before, ascending.

    ``where`` [k]: flat positions of the trained entries, ``change`` [k]: their values. If ``ranking`` returns
    fewer new entries than the share allows, fewer are dropped: those with the smallest changes.
    """
    n, order = int(share * len(where)), change.abs().sort(stable=True).indices
    may_leave, stays = where[order[:n]], where[order[n:]]
    grown = ranking(stays, n)
    leaving = may_leave[~torch.isin(may_leave, grown)]
    new = len(grown) - (n - len(leaving))
    return torch.cat([stays, grown, leaving[new:]]).sort().values


@register("spiel")
@dataclass(frozen=True)
class SpIEL(Sparse):
    """SpIEL: a moving set of entries; those that changed least are replaced by those with large gradients.

    Options:
        criterion: How new entries are chosen: by accumulated gradients (``ag``), or by the
            accumulators of SM3 (``ma``, with ``optimizer=sm3``).
        schedule: Period, share and decay of the exchanges; it must be ``drop_grow``.
        window: Number of steps at the start of a period in which gradients of candidates are summed.
    """

    criterion: Literal["ag", "ma"] = "ag"
    schedule: Schedule = DropGrow(every=20)
    window: Annotated[int, Ge(1)] = 5

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = (
        "a moving set of entries: the least changed are dropped, those with large gradients added"
    )
    paper: ClassVar[str] = "arXiv 2401.16405"

    def contradictions(self) -> list[str]:
        found = super().contradictions()
        if self.schedule.name != "drop_grow":
            found.append(
                f"schedule={self.schedule.name} does not say when entries are dropped and grown; take "
                "schedule=drop_grow, or method=sparse."
            )
        elif self.window >= self._periods.every:
            found.append(
                f"method.window={self.window} must end before its period does; take less than "
                f"schedule.every={self._periods.every}."
            )
        if self.score == "change":
            found.append(
                "method.score=change is 0 for every entry before training, so it cannot choose the "
                "first entries; take another score."
            )
        if self.grain != "element":
            found.append(
                f"method.grain={self.grain}: entries are dropped and grown one by one; take grain=element, "
                "or method=sparse."
            )
        return found

    def faults(self, steps: int) -> list[str]:
        if self.window < steps:
            return []
        return [
            f"method.window={self.window} is not below the run's {steps} steps, so no entry would ever move; "
            "take less."
        ]

    @property
    def _periods(self) -> DropGrow:
        """Return the schedule, typed; ``contradictions`` refuses every other class."""
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
                "method.criterion=ma chooses by the accumulators of SM3, which this optimizer does not "
                "have; take optimizer=sm3, or method.criterion=ag."
            )
        super().begin(run, state, previous)

    def before_step(self, run: Run, state: Any) -> None:
        if run.step % self._periods.every == self.window:
            self._exchange(run, state["bank"], state["candidates"])
            state["candidates"].resize(0)
        self.prepare_retry(run, state)

    def prepare_retry(self, run: Run, state: Any) -> None:
        """Watch the gradients of a step that lies in a window, unless the run ends before that window."""
        bank, candidates, place = state["bank"], state["candidates"], run.step % self._periods.every
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
    def _exchange(self, run: Run, bank: Bank, candidates: Candidates) -> None:
        """Exchange entries of every site."""
        share = self._periods.replaced(run.step, run.total)
        if run.step == self.window and self._periods.decay == "linear":
            share = 1.0
        found = []
        for i in range(len(bank.sizes)):
            if self.criterion == "ag":
                ranking = _by_gradient_sums(bank, candidates, i)
            else:
                ranking = _by_accumulators(run, bank, i)
            found.append(
                run.average_or_broadcast(exchange_entries(bank.positions(i), bank.slice(i), share, ranking))
            )
        # An optimizer without betas keeps no moments.
        betas = run.optimizer.param_groups[0].get("betas", (0.0, 0.0))
        seeds = candidates.seeds(bank, found, betas)
        newcomers = bank.revise(found, run.moments(bank.values), self._periods.dropped, seeds)
        run.log(churn=len(newcomers) / max(1, bank.active), trained=float(bank.active))


def _by_gradient_sums(bank: Bank, candidates: Candidates, i: int) -> Ranking:
    """Rank the candidates of site ``i`` by the absolute sums of their gradients."""
    index, sums, _, _ = candidates.at_site(bank, i)
    ranked = index[sums.abs().sort(descending=True, stable=True).indices]

    def ranking(stays: Tensor, n: int) -> Tensor:
        return ranked[~torch.isin(ranked, stays)][:n]

    return ranking


def _by_accumulators(run: Run, bank: Bank, i: int) -> Ranking:
    """Rank the untrained entries of site ``i`` by the products of SM3's accumulators.

    The square roots of the accumulators are multiplied: the order is the same, and the products are less
    likely to overflow or underflow.
    """
    accumulators = run.optimizer.state[bank.values]
    untrained = torch.ones(bank.sizes[i], dtype=torch.bool, device=bank.index.device)
    untrained.index_fill_(0, bank.positions(i).long(), False)
    pruned = bank.pruned(i)
    if pruned is not None:
        untrained &= ~pruned.reshape(-1)

    def ranking(stays: Tensor, n: int) -> Tensor:
        top = TopK(n, {i: 1})
        products = accumulators[f"row.{i}"].sqrt() * accumulators[f"col.{i}"].sqrt()
        top.add(i, products.float(), untrained)
        return top.take()[i]

    return ranking
