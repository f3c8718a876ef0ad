"""Choose the entries that a sparse method trains: at the start, and at each move of its schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attach import patched
from ..method import Run
from ..site import Site
from .bank import Bank
from .budgets import Budget, count_entries, divide_entries
from .grain import Grain
from .probe import Visit, scan_scores
from .schedule import Move
from .select import TopK
from .settings import SparseSettings

ScoreSource = Callable[[Visit], None]  # calls its argument once for every site
# Takes a site and returns which of its units may be chosen, [units] bool; None: all of them.
Allowed = Callable[[int], Tensor | None]


def allow_all(site: int) -> None:
    """Let every unit of the site be chosen."""


class Chooser:
    """Chooses entries of ``sites`` at one step of a run.

    ``dense``: the weight [out, in] of each site after a dense phase, which scores use in place of the current
    weight; None if there was no such phase. Every choice is returned as the flat positions of each site,
    int32, ascending, and is the same on all ranks.
    """

    def __init__(
        self,
        settings: SparseSettings,
        run: Run,
        bank: Bank,
        sites: list[Site],
        grains: list[Grain],
        budgets: list[Budget],
        dense: list[Tensor | None] | None = None,
    ) -> None:
        self.settings, self.run, self.bank = settings, run, bank
        self.sites, self.grains, self.budgets = sites, grains, budgets
        self.dense = dense or [None] * len(sites)

    def choose_best(self, share: float, allowed: Allowed = allow_all) -> list[Tensor]:
        """Choose the best entries by score, at a ``share`` of the budgets."""
        budgets = self._budgets_at(share)
        if self.settings.scope == "layer":
            budgets = self._divide_by_score(budgets[0].entries, allowed)
        chosen = choose_entries(budgets, self.grains, self._visit_scores, self._live(allowed))
        return [self.run.average_or_broadcast(where) for where in chosen]

    def apply_move(self, move: Move) -> list[Tensor]:
        """Choose the entries after a move that keeps some of the trained ones.

        The trained entries with the largest change stay, and the other entries with the best scores fill the
        rest of the budget. If the move drops by score and adds none, the trained entries with the best scores
        stay.
        """
        budgets = self._budgets_at(move.density)
        if self.settings.scope == "layer":  # each matrix keeps its share of the budget
            budgets = self._divide_by_count(budgets[0].entries)
        staying = [self._shrink(budget, move.drop) for budget in budgets]
        if move.by == "score" and staying == budgets:
            return self.choose_best(move.density, self._trained_units)
        kept = choose_entries(staying, self.grains, self._visit_changes, self._trained_units)
        rooms = []
        for budget in budgets:
            taken = sum(len(kept[i]) for i in budget.sites)
            rooms.append(Budget(budget.sites, budget.entries - taken))

        def not_kept(i: int) -> Tensor:
            return ~self.grains[i].members(kept[i])

        grown = choose_entries(rooms, self.grains, self._visit_scores, self._live(not_kept))
        together = [torch.cat(pair).sort().values for pair in zip(kept, grown, strict=True)]
        return [self.run.average_or_broadcast(where) for where in together]

    def _budgets_at(self, share: float) -> list[Budget]:
        """Return the budgets at a ``share`` of their entries."""
        counts = [count_entries(budget, share, self.sites, self.grains) for budget in self.budgets]
        return [Budget(budget.sites, count) for budget, count in zip(self.budgets, counts, strict=True)]

    def _shrink(self, budget: Budget, drop: float) -> Budget:
        """Return how many trained entries of a budget stay when at least the share ``drop`` leaves."""
        trained = sum(len(self.bank.positions(i)) for i in budget.sites)
        return Budget(budget.sites, min(trained - round(drop * trained), budget.entries))

    def _divide_by_count(self, total: int) -> list[Budget]:
        """Divide ``total`` entries among the sites in proportion to their trained entries."""
        trained = torch.tensor([len(self.bank.positions(i)) for i in range(len(self.sites))])
        counts = divide_entries(total, trained, [site.live for site in self.sites], self.grains)
        return [Budget([i], count) for i, count in enumerate(counts)]

    def _divide_by_score(self, total: int, allowed: Allowed) -> list[Budget]:
        """Divide ``total`` entries among the sites in proportion to size times mean score."""
        means: dict[int, Tensor] = {}
        allowed = self._live(allowed)

        def keep_mean(i: int, score: Tensor) -> None:
            pruned = self.sites[i].pruned
            if pruned is not None:
                score = score[~pruned]
            means[i] = score.mean().clamp(min=0).cpu()

        self._visit_scores(keep_mean)
        weights, limits = [], []
        for i, (site, grain) in enumerate(zip(self.sites, self.grains, strict=True)):
            weights.append(means[i] * site.live)
            units = allowed(i)
            limits.append(site.size if units is None else int(units.sum()) * grain.size)
        counts = divide_entries(total, torch.stack(weights), limits, self.grains)
        return [Budget([i], count) for i, count in enumerate(counts)]

    def _visit_scores(self, visit: Visit) -> None:
        """Call ``visit`` with every site and its scores, negated if the smallest are the best."""
        layers = patched(self.run.model)

        def visit_larger_is_better(i: int, score: Tensor) -> None:
            visit(i, score.neg_() if self.settings.direction == "smallest" else score)

        weights = [layers[site.name] for site in self.sites]
        scan_scores(self.settings, self.run, self.bank, weights, self.dense, visit_larger_is_better)

    def _visit_changes(self, visit: Visit) -> None:
        """Call ``visit`` with every site and the absolute change of its entries; untrained ones have 0."""
        for i in range(len(self.sites)):
            visit(i, self._absolute_changes(i))  # no name here, so that only one matrix is in memory

    def _absolute_changes(self, i: int) -> Tensor:
        """Return the absolute change of every entry of a site, [out, in] float32."""
        changes = torch.zeros(self.grains[i].shape, device=self.bank.values.device)
        changes.view(-1)[self.bank.positions(i).long()] = self.bank.slice(i).detach().abs().float()
        return changes

    def _live(self, allowed: Allowed) -> Allowed:
        """Return ``allowed`` without the entries that are held at 0.

        Where there are any, every unit is one entry.
        """

        def find_units(i: int) -> Tensor | None:
            units, pruned = allowed(i), self.sites[i].pruned
            if pruned is None:
                return units
            live = ~pruned.reshape(-1)
            return live if units is None else live & units.to(live.device)

        return find_units

    def _trained_units(self, i: int) -> Tensor:
        """Return which units of a site are trained now, [units] bool."""
        return self.grains[i].members(self.bank.positions(i))


def choose_entries(
    budgets: list[Budget], grains: list[Grain], visit_scores: ScoreSource, allowed: Allowed = allow_all
) -> list[Tensor]:
    """Choose the best entries of each budget, in whole units, among the allowed ones.

    Returns the flat positions of each site, int32, ascending. Raises ``ValueError`` for a score that is NaN.
    """
    tops: list[TopK] = []
    top_of_site: dict[int, TopK] = {}
    for budget in budgets:
        top = TopK(budget.entries, {i: grains[i].size for i in budget.sites})
        tops.append(top)
        top_of_site |= dict.fromkeys(budget.sites, top)
    chosen: dict[int, Tensor] = {}

    def visit(i: int, score: Tensor) -> None:
        if grains[i].m:
            chosen[i] = choose_n_of_m(score, grains[i])
        else:
            top_of_site[i].add(i, grains[i].pool(score), allowed(i))

    visit_scores(visit)
    for top in tops:
        for i, units in top.take().items():
            chosen[i] = grains[i].expand(units)
    return [chosen[i] for i in range(len(grains))]


def choose_n_of_m(score: Tensor, grain: Grain) -> Tensor:
    """Choose the best n of every m inputs by score [out, in]; return flat positions, int32, ascending.

    Raises ``ValueError`` for NaN.
    """
    if score.isnan().any():
        raise ValueError("a score is NaN")
    best = score.reshape(-1, grain.m).sort(dim=-1, descending=True, stable=True).indices[:, : grain.n]
    start = torch.arange(len(best), device=best.device)[:, None] * grain.m
    return (best + start).reshape(-1).sort().values.to(torch.int32)
