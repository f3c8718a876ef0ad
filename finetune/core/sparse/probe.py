"""Compute the scores of every site, one weight at a time.

Scores of gradients come from backward passes. Gradients are stored only as long as a score needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..layer import Patched
from ..method import Run
from ..part import WeightGrad
from ..statistics import divide_by_size
from .bank import Bank
from .scores import ScoredSite, score_named

Visit = Callable[[int, Tensor], None]  # takes a site's position and its scores, [out, in] float32


def scan_scores(
    method: Any, run: Run, bank: Bank, layers: list[Patched], trained: list[Tensor | None], visit: Visit
) -> None:
    """Call ``visit(i, score)`` once for each site i, with the score that ``method.score`` names.

    ``trained``: the weight [out, in] of each site after a dense phase, or None; it replaces the layer's
    weight. ``visit`` may overwrite the score. Raises ``ConfigError`` if the gradient of a layer comes in
    several pieces and the score needs it in one.

    ``method.selection`` says whether the model runs in eval or in train mode. Every pass in train mode draws
    the numbers that the next training step draws, so dropout is the same in both.

    With a single micro-batch, one backward pass serves all sites, and each gradient is scored and released as
    it arrives. With several, gradients must be summed first: the sites then take turns in groups no larger
    than the largest site, with one round of backward passes for each group.
    """
    score = score_named(method.score)

    def visit_score(i: int, grad: Tensor | None = None) -> None:
        with torch.no_grad():
            visit(i, score(ScoredSite(layers[i], run.generator, grad, trained[i]), method).float())

    if score.needs == "weight":
        for i in range(len(layers)):
            visit_score(i)
        return
    steps, in_training = run.upcoming(method.batches), method.selection == "train"
    if len(steps) == 1 and len(steps[0]) == 1:
        groups = [list(range(len(layers)))]
        visit_at_once = visit_score
    else:
        sizes = [layer.original.numel() for layer in layers]
        groups = list(divide_by_size(sizes, max(sizes)))
        visit_at_once = None
    for group in groups:
        sums = _GradientSums(group, score.needs, run, visit_at_once)
        with watching_gradients(bank, sums.add), _returning_draws(in_training):
            for micro in steps:
                for batch in micro:
                    sums.begin_pass()
                    run.backward(batch, micro, score.needs == "squares", in_training)
                sums.end_step()
        for i in group:
            if i not in sums.visited:
                visit_score(i, sums.take(i, layers[i].original))


def _returning_draws(enabled: bool) -> AbstractContextManager[None]:
    """Return a block after which torch's generators are as they were before it, if ``enabled``."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices, enabled)


class _GradientSums:
    """Adds up gradients of the sites of ``group`` over micro-batches, and what a score needs over steps.

    ``needs``: "gradient" (the sum over all micro-batches), "squares" (the sum over examples of the square of
    each gradient) or "batch squares" (the sum over steps of the square of a step's gradient). With ``visit``
    a gradient is passed on as soon as it arrives, and nothing is stored.
    """

    def __init__(
        self, group: list[int], needs: str, run: Run, visit: Callable[[int, Tensor], None] | None
    ) -> None:
        self.group, self.needs, self.run, self.visit = set(group), needs, run, visit
        self.visited: set[int] = set()
        self.arrived: set[int] = set()  # sites whose gradient came in the current backward pass
        self.sums: dict[
            int, Tensor
        ] = {}  # over the micro-batches of a step, for "batch squares"; else over all
        self.squares: dict[int, Tensor] = {}  # over steps, for "batch squares" only

    def begin_pass(self) -> None:
        """Begin a backward pass."""
        self.arrived = set()

    def add(self, i: int, grad: WeightGrad) -> bool:
        """Add the gradient of site ``i``; return True, since nothing else needs it.

        Raises ``ConfigError`` for the second gradient of a site in one pass, where the sum of both is needed
        at once.
        """
        if i not in self.group:
            return True
        if i in self.arrived and (self.visit or self.needs == "squares"):
            raise ConfigError(
                "method.score needs the gradient of a layer in one piece, and a layer of this model runs "
                "more than once a forward pass. Choose a score of the weights, such as score=magnitude, or "
                "leave the layer out of method.targets."
            )
        self.arrived.add(i)
        found = grad.squares if self.needs == "squares" else grad.dense
        if self.visit:
            found = self.run.average_or_broadcast(found)
            self.visit(i, found.square_() if self.needs == "batch squares" else found)
            self.visited.add(i)
        else:
            _accumulate(self.sums, i, found)
        return True

    def end_step(self) -> None:
        """Square the complete gradients of a step, where squares of steps are needed."""
        if self.needs == "batch squares":
            for i in sorted(self.sums):
                _accumulate(self.squares, i, self.run.average_or_broadcast(self.sums.pop(i)).square_())

    def take(self, i: int, weight: Tensor) -> Tensor:
        """Return the sum of site ``i``, float32 of the shape of ``weight``; 0 where no gradient came."""
        if i in self.squares:
            return self.squares.pop(i)
        if i in self.sums:
            return self.run.average_or_broadcast(self.sums.pop(i))
        return torch.zeros_like(weight, dtype=torch.float32)


def _accumulate(sums: dict[int, Tensor], i: int, tensor: Tensor) -> None:
    """Add ``tensor`` to the sum of site ``i`` in place, or begin the sum with it."""
    if i in sums:
        sums[i].add_(tensor)
    else:
        sums[i] = tensor


@contextmanager
def watching_gradients(bank: Bank, watch: Callable[[int, WeightGrad], bool]) -> Iterator[None]:
    """Inside, ``bank`` passes every gradient of its sites to ``watch``, and no site is frozen."""
    frozen, bank.frozen, bank.watch = bank.frozen, [False] * len(bank.frozen), watch
    try:
        yield
    finally:
        bank.frozen, bank.watch = frozen, None
