"""The interface of a method: a frozen set of hyperparameters, and functions over explicit state.

The training loop calls them in this order and knows no method by name:

    for phase in method.phases():
        state = method.build(model)         attach parts; shapes follow from config and model, never from data
        load a checkpoint into state, or method.begin(run, state, previous)
        for every step:
            before_step -> forward, task loss + loss -> backward -> after_backward -> optimizer.step ->
            after_step
        previous = state                    its parts are detached, so the base is what it was; or they stay,
                                            frozen, if the phase says that it keeps them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from .attach import attach
from .objective import Objective
from .part import Delta
from .run import Run as Run  # part of what this module offers
from .site import Site, find_sites
from .state import Shapes, stored_shapes

LRSchedule = Literal["restart", "span"]


@dataclass(frozen=True)
class Phase:
    """A part of the run under one method; ``share`` is its share of the steps.

    ``schedule``: with ``restart`` the learning rate's schedule and its warm-up run over the steps of this
    phase; with ``span`` they run over the whole run, and the phase uses its section of them.
    ``objective``: what is minimized in this phase; None: the objective of the run.
    ``keeps``: the parts of this phase stay attached under those of the next one, frozen, and the head is
    trained further; dropout inside these parts stays active while the next phase trains. Otherwise the parts
    are detached, and the head is reset to its start.
    """

    method: Method
    share: float
    schedule: LRSchedule = "span"
    objective: Objective | None = None
    keeps: bool = False


@dataclass(frozen=True)
class Method:
    """Base of all methods. Fields are hyperparameters; class variables are facts that checks rely on.

    Options:
        head: Train the head of a classifier. ``false`` freezes it, which only a kept head allows
            (``model.head``).
    """

    KIND: ClassVar[str] = "method"
    name: ClassVar[str]
    family: ClassVar[str]
    trains: ClassVar[str]  # what is trained, as a phrase
    paper: ClassVar[str] = ""
    size: ClassVar[str] = ""  # the setting that decides how much is trained; empty if none does
    neutral_start: ClassVar[bool] = True  # whether the model computes what the base computes at step 0
    mergeable: ClassVar[bool] = True  # whether plain weights can hold the change
    unused_parameters: ClassVar[bool] = False  # whether some trained tensors may get no gradient in a step

    head: bool = field(default=True, kw_only=True)

    @classmethod
    def is_preset(cls) -> bool:
        """Tell whether the class only sets defaults of an engine that is tested by itself."""
        return False

    @property
    def reads_gradients(self) -> bool:
        """Tell whether the method itself uses gradients, besides the optimizer."""
        return type(self).after_backward is not Method.after_backward

    def faults(self, steps: int) -> list[str]:
        """Return why the settings make no sense in a run of ``steps`` steps, one sentence for each fault."""
        return []

    def meets_target(self, step: int, total: int) -> bool:
        """Tell whether the state after ``step`` (from 0) of ``total`` is what the settings ask for.

        Until then the method trains more or something else. The choice of the best state starts again when
        the target is met.
        """
        return True

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of a run, whose shares sum to 1."""
        return (Phase(self, 1.0),)

    def build(self, model: nn.Module) -> nn.Module:
        """Attach parts to ``model`` and return the state that owns them.

        Raises ``ConfigError`` if the method does not fit the model.
        """
        raise NotImplementedError

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        """Set values from data or the previous phase's state. Called once per phase, but not on resume."""

    def before_step(self, run: Run, state: Any) -> None:
        """Called before the forward pass of a step."""

    def prepare_retry(self, run: Run, state: Any) -> None:
        """Redo the set-up of ``before_step`` for a retry of the step (out of memory, fp16 overflow)."""

    def after_backward(self, run: Run, state: Any) -> None:
        """Called when the gradients of a step are complete, before they are clipped."""

    def after_step(self, run: Run, state: Any) -> None:
        """Called after the optimizer's step."""

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        """Return a term that is added to the task's loss of a micro-batch."""
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
        """Return dtype and shape of every tensor that a run of ``steps`` steps stores, by name.

        None if training decides. ``state`` may be on the meta device, where tensors have no values.
        """
        return stored_shapes(state)


@dataclass(frozen=True)
class Reparam(Method):
    """Base of the methods that attach one delta to each layer.

    Options:
        targets: Layers to change: roles (``q``), groups of roles (``attention``, ``mlp``, ``all``), or
            patterns of layer names.
    """

    targets: tuple[str, ...] = ("all",)

    def delta(self, site: Site) -> Delta:
        """Make the change of one layer."""
        raise NotImplementedError

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = nn.ModuleDict()
        for site in find_sites(model, self.targets):
            delta = state[site.key] = self.delta(site)
            attach(model, site.name, delta)
        return state
