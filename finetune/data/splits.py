"""Divide rows into train, val and test.

The division has a seed of its own, so that the seed of a run never moves an example to another split.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence


def spread_classes(labels: Sequence[Hashable], seed: int) -> list[int]:
    """Return the positions of ``labels`` in a random order in which all stretches have similar class shares.

    One row of each class comes first.
    """
    shuffled = list(range(len(labels)))
    random.Random(seed).shuffle(shuffled)
    totals: dict[Hashable, int] = {}
    rank_in_class = {}
    for place in shuffled:
        rank_in_class[place] = totals.get(labels[place], 0)
        totals[labels[place]] = rank_in_class[place] + 1
    # Sorting is stable, so rows with equal keys stay shuffled.
    return sorted(shuffled, key=lambda place: rank_in_class[place] / totals[labels[place]])


def cut_stretches(order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Return consecutive stretches of ``order`` of the given sizes, each in ascending order."""
    stretches, start = [], 0
    for size in sizes:
        stretches.append(sorted(order[start : start + size]))
        start += size
    return stretches
