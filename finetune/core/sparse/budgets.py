"""Budgets of the sparse engine: which sites compete with each other, and for how many trained entries."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..site import Site
from .grain import Grain
from .select import apportion
from .settings import Scope


@dataclass(frozen=True)
class Budget:
    """Sites that compete with each other, by position, and how many of their entries may be trained (K)."""

    sites: list[int]
    entries: int


def make_budgets(scope: Scope, sparsity: float, sites: list[Site], grains: list[Grain]) -> list[Budget]:
    """Return one budget for each group of sites that ``scope`` puts together.

    K is the number of the group's live entries minus the rounded share ``sparsity`` of it; entries that are
    held at 0 do not count. If all units have the same size, K is rounded to whole units. At least one unit is
    trained. With a grain n:m, K follows from n:m instead, because ``sparsity`` gives the number of entries in
    each row only approximately.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, site in enumerate(sites):
        groups.setdefault(_group_key(scope, i, site), []).append(i)
    return [Budget(members, _budget_entries(sparsity, members, sites, grains)) for members in groups.values()]


def _group_key(scope: Scope, i: int, site: Site) -> Hashable:
    """Return the same key for sites of one budget. For ``layer``, the model's budget is divided later."""
    if scope == "matrix":
        return i
    if scope == "role":
        return site.role
    if scope == "block":
        return site.block
    return "model"


def _budget_entries(sparsity: float, members: list[int], sites: list[Site], grains: list[Grain]) -> int:
    """Return K of one group."""
    size = sum(sites[i].live for i in members)
    k = size - round(sparsity * size)
    if grains[members[0]].m:
        k = sum(sites[i].size // grains[i].m * grains[i].n for i in members)
    units = {grains[i].size for i in members}
    unit = min(units)
    if len(units) > 1:
        return max(k, unit)
    return max(round(k / unit), 1) * unit


def count_entries(budget: Budget, share: float, sites: list[Site], grains: list[Grain]) -> int:
    """Return how many entries are trained at a ``share`` of the budget, in multiples of the smallest unit.

    The result is at least one unit and at most all live entries of the budget's sites.
    """
    unit = min(grains[i].size for i in budget.sites)
    units = max(round(share * budget.entries / unit), 1)
    return min(units * unit, sum(sites[i].live for i in budget.sites))


def divide_entries(total: int, weights: Tensor, limits: list[int], grains: list[Grain]) -> list[int]:
    """Divide ``total`` entries among the sites in proportion to ``weights`` [sites], none above its limit.

    The parts are whole units if all units have the same size, otherwise single entries. Raises
    ``ValueError`` if the limits add up to less than ``total``.
    """
    sizes = {grain.size for grain in grains}
    unit = sizes.pop() if len(sizes) == 1 else 1
    units = apportion(total // unit, weights, [limit // unit for limit in limits])
    return [unit * count for count in units]
