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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from .bank import Bank, SparseDelta
from .collective import agree
from .part import Delta, attach, base
from .site import Site, find_sites


@dataclass
class Run:
    """What a method may see and touch while it is trained. ``step`` counts from 0 within the phase, ``total`` is the phase's length."""

    model: nn.Module
    states: nn.Module
    optimizer: torch.optim.Optimizer
    total: int
    generator: torch.Generator
    evaluate: Callable[[Any], Tensor]
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

    name: ClassVar[str]
    family: ClassVar[str]
    trains: ClassVar[str]
    paper: ClassVar[str] = ""
    neutral_start: ClassVar[bool] = True  # at step 0 the output is the base's
    mergeable: ClassVar[bool] = True
    unused_parameters: ClassVar[bool] = False  # some trained tensors may get no gradient in a step

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self, 1.0),)

    def build(self, model: nn.Module) -> nn.Module:
        """Attach parts to ``model`` and return the state that owns them. Raises ``ConfigError`` where the model does not fit."""
        raise NotImplementedError

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        """Set values from data or from the previous phase's state; once a phase, not on resume."""

    def before_step(self, run: Run, state: Any) -> None: ...

    def after_backward(self, run: Run, state: Any) -> None: ...

    def after_step(self, run: Run, state: Any) -> None: ...

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        """A term added to the task's loss."""
        return 0.0


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


@dataclass(frozen=True)
class Sparse(Method):
    """K existing entries of each site, K = site size minus the ``sparsity`` share of it, rounded; which ones, ``begin`` says."""

    targets: tuple[str, ...] = ("all",)
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.98

    def count(self, site: Site) -> int:
        """Entries that may change: at least one."""
        return max(1, site.size - round(self.sparsity * site.size))

    def build(self, model: nn.Module) -> nn.ModuleDict:
        sites = find_sites(model, self.targets)
        bank = Bank(sites, [self.count(s) for s in sites])
        views = [SparseDelta(bank, i, s) for i, s in enumerate(sites)]
        for site, view in zip(sites, views, strict=True):
            attach(model, site.name, view)
        return nn.ModuleDict({"bank": bank, "views": nn.ModuleList(views)})
