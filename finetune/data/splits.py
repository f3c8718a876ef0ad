"""Dividing rows into train, val and test: by a seed of their own, so that the run's seed never moves an example."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence


def spread(labels: Sequence[Hashable], seed: int) -> list[int]:
    """An order of ``range(len(labels))`` in which every stretch holds the classes in proportion, each class's first row at the front."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    totals: dict[Hashable, int] = {}
    rank = {}
    for i in order:
        rank[i] = totals.get(labels[i], 0)
        totals[labels[i]] = rank[i] + 1
    return sorted(order, key=lambda i: rank[i] / totals[labels[i]])  # stable: ties stay shuffled


def cut(order: Sequence[int], *sizes: int) -> list[list[int]]:
    """Consecutive stretches of ``order`` of the given sizes, each in ascending order."""
    parts, start = [], 0
    for size in sizes:
        parts.append(sorted(order[start : start + size]))
        start += size
    return parts
