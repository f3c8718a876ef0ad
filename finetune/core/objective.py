"""The interface of an objective: the loss that a step minimizes, as sums that add up over micro-batches.

A term is a sum over examples or scored tokens, for example. Its mean is that sum divided by the count of the
whole step, over all micro-batches and processes. The count follows from the batch alone, so it is known
before the first forward pass, and a split batch gives the same loss and gradients as the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .run import Run, Seen

Need = Literal["hidden", "attention"]
BASE, PREVIOUS = "base", "previous"  # names of references that are not paths


@dataclass(frozen=True)
class Objective:
    """Base of all objectives. Fields are hyperparameters; class variables are facts that checks rely on.

    ``needs``: what ``terms`` uses of a forward pass besides the logits.
    ``exact``: False if the terms of micro-batches do not add up to those of the whole batch, for example
    because a term is a ratio of sums over a batch.
    ``keeps_best``: False if a better validation does not mean a better run, as in unlearning. The last state
    is then stored, and a run that asks for the best one is refused.
    """

    KIND: ClassVar[str] = "objective"
    name: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ()
    exact: ClassVar[bool] = True
    keeps_best: ClassVar[bool] = True

    def faults(self, steps: int) -> list[str]:
        """Return why the settings make no sense in a run of ``steps`` steps, one sentence for each fault."""
        return []

    def references(self) -> tuple[str, ...]:
        """Name the frozen models that ``terms`` compares with: ``base``, ``previous``, or model folders."""
        return ()

    def streams(self) -> tuple[str, ...]:
        """Name the data streams that ``terms`` uses beside the training data, such as ``retain``.

        Each step then has micro-batches of every stream, each in a forward pass of its own. ``batch.stream``
        names the stream of a micro-batch (``train`` for the training data), and ``terms`` and ``counts``
        return only the terms of that stream.
        """
        return ()

    def check(self, run: Run) -> None:
        """Raise ``ConfigError`` with every reason why the objective does not fit the data or the model.

        Called before the first step.
        """

    def counts(self, run: Run, batch: Any) -> dict[str, float]:
        """Return what a micro-batch adds to the count of each term. It follows from the batch alone."""
        raise NotImplementedError

    def weights(self, run: Run) -> dict[str, float]:
        """Return the weight of each term's mean in the loss; 1 for a term that is not named."""
        return {}

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        """Return the terms of a micro-batch, with the names that ``counts`` gives: scalar sums with gradient.

        ``seen``: the outputs of the trained model. ``run.reference(name)(batch)`` returns those of a frozen
        model, without gradient.
        """
        raise NotImplementedError
