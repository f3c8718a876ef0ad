"""Scores of every site, one weight at a time; those of gradients from backward passes that keep no more of them than a choice may need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..method import Run
from ..part import Patched, WeightGrad
from .bank import Bank
from .scores import SCORES, Look


def scan(
    method: Any, run: Run, bank: Bank, layers: list[Patched], trained: list[Tensor | None], offer: Callable[[int, Tensor], None]
) -> None:  # fmt: skip
    """Call ``offer(i, score)`` once for each site, of the score that ``method.score`` names. ``trained``: the weights after a dense phase, if any.

    Where one backward pass tells all (one micro-batch), each gradient is scored as it comes by and forgotten. Otherwise gradients must be summed: the
    sites take turns in groups no larger than the largest of them, one round of passes each.
    """
    score = SCORES[method.score]

    def give(i: int, grad: Tensor | None = None) -> None:
        with torch.no_grad():
            offer(i, score.of(Look(layers[i], run.generator, grad, trained[i]), method).float())

    if score.needs == "weight":
        for i in range(len(layers)):
            give(i)
        return
    steps = run.upcoming(method.batches)
    whole = len(steps) == 1 and len(steps[0]) == 1
    for group in (
        [list(range(len(layers)))] if whole else _turns([layer.original.numel() for layer in layers])
    ):
        sums = _Sums(group, score.needs, run, give if whole else None)
        with watching(bank, sums):
            for micro in steps:
                for batch in micro:
                    sums.seen = set()
                    run.backward(batch, micro, score.needs == "squares")
                sums.end_of_batch()
        for i in group:
            if i not in sums.given:
                found = sums.take(i)
                give(i, torch.zeros_like(layers[i].original, dtype=torch.float32) if found is None else found)


def _turns(sizes: list[int]) -> Iterator[list[int]]:
    """Consecutive sites in groups of at most the largest site's size."""
    group: list[int] = []
    for i, size in enumerate(sizes):
        if group and sum(sizes[j] for j in group) + size > max(sizes):
            yield group
            group = []
        group.append(i)
    yield group


class _Sums:
    """Collects, for the sites of ``group``, gradients over micro-batches and what the score needs of them over batches."""

    def __init__(
        self, group: list[int], needs: str, run: Run, at_once: Callable[[int, Tensor], None] | None
    ) -> None:
        self.group, self.needs, self.run, self.at_once = set(group), needs, run, at_once
        self.given: set[int] = set()
        self.seen: set[int] = set()  # in this backward pass
        self.batch: dict[int, Tensor] = {}
        self.total: dict[int, Tensor] = {}  # stays empty where sums over batches are sums over micro-batches

    def __call__(self, i: int, grad: WeightGrad) -> bool:
        if i in self.group:
            if i in self.seen and (self.at_once or self.needs == "squares"):
                raise ConfigError(
                    "method.score needs the gradient of a layer in one piece, and a layer of this model runs more than once a pass. "
                    "Choose a score of the weights, such as magnitude, or leave the layer out of method.targets."
                )
            self.seen.add(i)
            found = grad.squares if self.needs == "squares" else grad.dense
            if self.at_once:
                found = self.run.agree(found)
                self.at_once(i, found.square_() if self.needs == "batch squares" else found)
                self.given.add(i)
            else:
                self.batch[i] = self.batch[i].add_(found) if i in self.batch else found
        return True

    def end_of_batch(self) -> None:
        """The gradients of one batch are complete."""
        if self.needs == "batch squares":
            for i in sorted(self.batch):
                found = self.run.agree(self.batch.pop(i)).square_()
                self.total[i] = self.total[i].add_(found) if i in self.total else found

    def take(self, i: int) -> Tensor | None:
        """What has been collected of a site; None where no gradient came by."""
        if i in self.total:
            return self.total.pop(i)
        return self.run.agree(self.batch.pop(i)) if i in self.batch else None


class watching:
    """While it lasts, ``bank`` shows every gradient to ``see``, and no site rests."""

    def __init__(self, bank: Bank, see: Callable[[int, WeightGrad], bool]) -> None:
        self.bank, self.see = bank, see

    def __enter__(self) -> None:
        self.frozen, self.bank.frozen, self.bank.watch = (
            self.bank.frozen,
            [False] * len(self.bank.frozen),
            self.see,
        )

    def __exit__(self, *_: Any) -> None:
        self.bank.frozen, self.bank.watch = self.frozen, None
