"""What a method or an objective may see and use while a run is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attach import base
from .collective import average_or_broadcast


@dataclass(frozen=True)
class Seen:
    """What a forward pass gave.

    ``logits``: [n, classes], or [n, length, vocabulary] of a language model. ``hidden``, if it was asked for:
    the output of the embeddings and of each block, each [n, tokens, width]. ``attention``, if it was asked
    for: the attention weights of each block, each [n, heads, tokens, tokens].
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()


class Reference(Protocol):
    """A frozen model that an objective or a method compares with. ``model`` is what computes it."""

    model: Any

    def __call__(self, batch: Any) -> Seen:
        """Return what the model gives for a batch, in eval mode and without gradient."""


@dataclass
class Run:
    """What a method may see and use while it is trained.

    A step's batch is a list of micro-batches, those of each stream after those of the training data; one is
    None if this process has no example of it.
    """

    model: Any
    states: nn.Module
    optimizer: torch.optim.Optimizer
    total: int  # steps of the phase
    generator: torch.Generator
    # Computes the mean loss over a step's batch, in eval mode, over all processes.
    evaluate: Callable[[Any], Tensor]
    # Returns the batches of the next steps, as many as asked for.
    upcoming: Callable[[int], list[list[Any]]]
    # Runs forward and backward of one micro-batch (and its step's batch). Only ``Bank.watch`` sees the
    # gradients. The first flag: of the sum over examples instead of the step's mean loss. The second flag:
    # in train mode, with dropout, instead of in eval mode.
    backward: Callable[[Any, list[Any], bool, bool], None]
    # Computes the logits of a micro-batch in eval mode at the scored places, [places, classes], of this
    # process alone.
    logits: Callable[[Any], Tensor]
    # Returns a frozen model: "base" is the model before training, and a path names a model folder. It is read
    # once. Raises ``ConfigError`` if it does not fit.
    reference: Callable[[str], Reference]
    # Returns how many training examples each class has; None for a language model.
    class_counts: Callable[[], list[int] | None]
    # Inside ``with run.stream_gradients(NAME) as mean:`` the ``grad`` of each trained tensor is the gradient
    # of ``mean``: the mean cross-entropy of the step's examples of a data stream, over all processes and in
    # eval mode. Frozen tensors have no gradient. After the block, no tensor has one.
    stream_gradients: Callable[[str], AbstractContextManager[float]]
    seed: int = 0  # of the phase, the same on all processes
    step: int = 0  # counts from 0 within the phase
    batch: Any = None
    metrics: dict[str, float] = field(default_factory=dict)

    def average_or_broadcast(self, t: Tensor) -> Tensor:
        """Return one tensor for all processes: the mean of floats, otherwise that of the first process."""
        return average_or_broadcast(t)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Make the model the pretrained one, to the bit, inside the block."""
        with base(self.states):
            yield

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's tensors that have one element for each element of ``parameter``."""
        found = {}
        for name, value in self.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[name] = value
        return found

    def log(self, **metrics: float) -> None:
        """Log these numbers with the current step."""
        self.metrics |= metrics
