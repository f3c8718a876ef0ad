"""Compute how many entries the settings of a sparse method ask for."""

from __future__ import annotations

from ..site import Site
from .grain import Grain
from .schedule import Schedule
from .settings import SparseSettings


def scheduled_share(schedule: Schedule, step: int, total: int) -> float:
    """Return the share of the budget that is trained after ``step`` (from 0) of ``total`` steps."""
    share = schedule.initial_density(total)
    for earlier in range(1, step + 1):
        move = schedule.move(earlier, total)
        if move is not None:
            share = move.density
    return share


def requested_entries(
    settings: SparseSettings, share: float, sites: list[Site], grains: list[Grain]
) -> tuple[float, int]:
    """Return how many entries the settings ask for at a ``share`` of the budget, and the rounding error.

    The error is at most one unit per site.
    """
    size = sum(site.live for site in sites)
    unit = max(grain.size for grain in grains)
    return (1 - settings.sparsity) * share * size, unit * len(sites)


def adjacent_entries(grain: str, shapes: list[tuple[int, int]]) -> int:
    """Return how many entries, adjacent in memory, are always chosen together; the least over ``shapes``."""
    if grain.startswith("block:"):
        return int(grain.removeprefix("block:"))
    if grain in ("row", "head"):
        return min(in_ for _, in_ in shapes)
    if grain == "matrix":
        return min(out * in_ for out, in_ in shapes)
    return 1


def settled_depend_on_training(schedule: Schedule, total: int) -> bool:
    """Tell whether training decides how many entries are stored.

    It does if entries that are dropped keep their change while others are added.
    """
    if schedule.dropped != "kept":
        return False
    for step in range(1, total):
        move = schedule.move(step, total)
        if move and (move.redraw or (move.drop and move.by == "change")):
            return True
    return False
