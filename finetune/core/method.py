"""What a method is: a frozen set of hyperparameters and a few functions over explicit state.

The loop calls them in this order and knows no method by name:

    for phase in method.phases():
        state = method.build(model)                     shapes from config and model, never from data; parts attached
        load a checkpoint into state, or method.begin(run, state, previous)
        for every step:
            before_step -> forward, task loss + loss -> backward -> after_backward -> optimizer.step -> after_step
        previous = state; its parts are detached         the base is as it was
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .collective import agree
from .part import Delta, attach, base
from .site import Site, find_sites
from .state import Shapes, stored_shapes


@dataclass
class Run:
    """What a method may see and touch while it is trained. ``step`` counts from 0 within the phase, ``total`` is the phase's length."""

    model: nn.Module
    states: nn.Module
    optimizer: torch.optim.Optimizer
    total: int
    generator: torch.Generator
    evaluate: Callable[[Any], Tensor]
    upcoming: Callable[
        [int], list[list[Any]]
    ]  # the micro-batches of the next so many steps; None where this process has no example
    backward: Callable[
        [Any, list[Any], bool], None
    ]  # one of a step's micro-batches, outside training: only a bank's ``watch`` sees the gradients
    logits: Callable[
        [Any], Tensor
    ]  # of a micro-batch in eval mode, at the places that the loss is averaged over: [places, classes]; not exchanged
    step: int = 0
    batch: Any = None
    metrics: dict[str, float] = field(default_factory=dict)

    def agree(self, t: Tensor) -> Tensor:
        """One value for all processes: floats averaged, integers from the first."""
        return agree(t)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the model is the pretrained one, to the bit."""
        with base(self.states):
            yield

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's tensors that have one element for each element of ``parameter``."""
        state = self.optimizer.state.get(parameter, {})
        return {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape}

    def log(self, **metrics: float) -> None:
        """Add to what is logged with the current step."""
        self.metrics |= metrics


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, ``share`` of its steps, under one method."""

    method: Method
    share: float


@dataclass(frozen=True)
class Method:
    """Base of all methods."""

    KIND: ClassVar[str] = "method"
    name: ClassVar[str]
    family: ClassVar[str]
    trains: ClassVar[str]
    paper: ClassVar[str] = ""
    size: ClassVar[str] = ""  # the setting that decides how much is trained; none: that is fixed
    neutral_start: ClassVar[bool] = True  # at step 0 the output is the base's
    mergeable: ClassVar[bool] = True
    unused_parameters: ClassVar[bool] = False  # some trained tensors may get no gradient in a step

    def faults(self, steps: int) -> list[str]:
        """What cannot mean anything in a run of so many steps, each as a sentence that names the setting."""
        return []

    def ready(self, step: int, total: int) -> bool:
        """Whether the state after ``step`` (from 0) of ``total`` is what was asked for; until then it is a means, and never kept as the best."""
        return True

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self, 1.0),)

    def build(self, model: nn.Module) -> nn.Module:
        """Attach parts to ``model`` and return the state that owns them. Raises ``ConfigError`` where the model does not fit."""
        raise NotImplementedError

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        """Set values from data or from the previous phase's state; once a phase, not on resume."""

    def before_step(self, run: Run, state: Any) -> None: ...

    def prepare_retry(self, run: Run, state: Any) -> None:
        """Redo the set-up of ``before_step``. Called before a step is retried (out of memory, fp16 overflow)."""

    def after_backward(self, run: Run, state: Any) -> None: ...

    def after_step(self, run: Run, state: Any) -> None: ...

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        """A term added to the task's loss."""
        return 0.0

    def check_trained(self, run: Run, state: Any) -> list[str]:
        """Compare what is trained with what the settings ask for. Returns each difference as a sentence."""
        return []

    def check_stored(
        self, run: Run, state: Any, shapes: Mapping[str, tuple[int, ...]], step: int
    ) -> list[str]:
        """Compare the change stored after ``step`` (from 0, within the phase) with what the settings ask for.

        ``shapes``: of the stored tensors, by their name in ``state``. Returns each difference as a sentence.
        """
        return []

    def stored_shapes(self, state: nn.Module, steps: int) -> Shapes | None:
        """Return dtype and shape of every tensor that a run of ``steps`` steps stores, by its name in ``state``.

        None if training decides. ``state`` may be on the meta device, where tensors have no values.
        """
        return stored_shapes(state)


@dataclass(frozen=True)
class Reparam(Method):
    """One delta a site, of the method's own making. ``targets``: roles, groups of roles, or patterns of layer names."""

    targets: tuple[str, ...] = ("all",)

    def delta(self, site: Site) -> Delta:
        """The change of one site."""
        raise NotImplementedError

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = nn.ModuleDict()
        for site in find_sites(model, self.targets):
            delta = state[site.key] = self.delta(site)
            attach(model, site.name, delta)
        return state
