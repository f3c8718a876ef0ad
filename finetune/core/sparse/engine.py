"""The sparse engine: methods that train existing entries of the weights, chosen along five axes.

score      the number that entries are chosen by (``scores.py``)
direction  whether the largest or the smallest scores are chosen
scope      which entries compete for one budget (``budgets.py``)
grain      the units that are chosen as a whole (``grain.py``)
schedule   when the choice is made again (``schedule.py``)

Published methods are presets of these axes. The trained values are changes of the weights: they start at 0
and are float32; the base weights stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..attach import attach, patched
from ..inplace import InPlace
from ..method import Method, Phase, Run
from ..site import Site, find_sites
from ..state import Shapes
from .bank import Bank, SparseDelta
from .budgets import Budget, count_entries, make_budgets
from .choosing import Chooser
from .grain import Grain, make_grain
from .requested import adjacent_entries, requested_entries, scheduled_share, settled_depend_on_training
from .scores import score_named
from .settings import SparseSettings
from .validation import find_contradictions


@dataclass(frozen=True)
class Sparse(SparseSettings):
    """Train a chosen set of existing entries of the weights.

    Hooks of a subclass: ``contradictions`` checks its settings, ``budgets`` says how many entries are
    trained, ``choose`` says which, and ``before_step`` moves them.
    """

    family: ClassVar[str] = "sparse delta"
    size: ClassVar[str] = "sparsity"

    def __post_init__(self) -> None:
        found = self.contradictions()
        if found:
            raise ValueError(" ".join(found))

    @classmethod
    def is_preset(cls) -> bool:
        """Tell whether the class sets defaults of ``Sparse`` only, and overrides none of its functions."""
        for base in cls.__mro__[: cls.__mro__.index(Sparse)]:
            for name, value in vars(base).items():
                is_function = inspect.isroutine(value) or isinstance(value, property)
                made_by_dataclass = name.startswith("__") and name != "__post_init__"
                if is_function and not made_by_dataclass:
                    return False
        return True

    def contradictions(self) -> list[str]:
        """Return one sentence for each pair of settings that contradict each other or would be ignored."""
        return find_contradictions(self)

    @property
    def reads_gradients(self) -> bool:
        return super().reads_gradients or score_named(self.score).needs != "weight"

    def faults(self, steps: int) -> list[str]:
        return self.schedule.faults(steps)

    def meets_target(self, step: int, total: int) -> bool:
        return self.schedule.is_within_budget(step, total)

    def phases(self) -> tuple[Phase, ...]:
        dense = self.schedule.dense
        if not dense:
            return (Phase(self, 1.0),)
        schedule = self.schedule.lr_schedule
        return Phase(Dense(targets=self.targets), dense, schedule), Phase(self, 1 - dense, schedule)

    def budgets(self, sites: list[Site], grains: list[Grain]) -> list[Budget]:
        """Return the budgets that the sites compete for; the schedule trains a share of them."""
        return make_budgets(self.scope, self.sparsity, sites, grains)

    def build(self, model: nn.Module) -> nn.ModuleDict:
        sites = find_sites(model, self.targets)
        self._refuse_units_with_zeros(sites)
        grains = [make_grain(self.grain, site, model) for site in sites]
        capacity = 0
        for budget in self.budgets(sites, grains):
            capacity += count_entries(budget, self.schedule.peak, sites, grains)
        bank = Bank(sites, capacity)
        bank.chooses_live = True
        views = [SparseDelta(bank, i, site) for i, site in enumerate(sites)]
        for site, view in zip(sites, views, strict=True):
            attach(model, site.name, view)
        return nn.ModuleDict({"bank": bank, "views": nn.ModuleList(views)})

    def _refuse_units_with_zeros(self, sites: list[Site]) -> None:
        """Raise ``ConfigError`` if units of several entries would be chosen in a pruned weight."""
        for site in sites:
            if self.grain != "element" and site.pruned is not None:
                raise ConfigError(
                    f"method.grain={self.grain} chooses whole units, and entries of {site.name} are pruned "
                    "and stay 0. Take method.grain=element, or set model.zeros=free, which lets every entry "
                    "change."
                )

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        state["bank"].place(self.choose(run, state, self.schedule.initial_density(run.total), previous))

    def before_step(self, run: Run, state: Any) -> None:
        move = self.schedule.move(run.step, run.total) if run.step else None
        if move is None:
            return
        bank: Bank = state["bank"]
        if move.redraw:
            chosen = self.choose(run, state, move.density)
        else:
            chosen = self.make_chooser(run, state).apply_move(move)
        newcomers = bank.revise(chosen, run.moments(bank.values), self.schedule.dropped)
        run.log(churn=len(newcomers) / max(1, bank.active), trained=float(bank.active))

    def choose(self, run: Run, state: Any, share: float, previous: Any = None) -> list[Tensor]:
        """Choose the best entries of each site by score, at a ``share`` of the budgets.

        ``previous``: the state of the previous phase; if that phase trained all entries, scores use its
        weights. Returns flat positions, int32, ascending.
        """
        return self.make_chooser(run, state, previous).choose_best(share)

    def make_chooser(self, run: Run, state: Any, previous: Any = None) -> Chooser:
        """Make the chooser for the current step."""
        sites, grains = self.sites_and_grains(run, state)
        dense: list[Tensor | None] | None = None
        if isinstance(previous, InPlace):
            weights = previous.trained()
            dense = [site.as_matrix(weights[f"{site.name}.weight"]) for site in sites]
        return Chooser(self, run, state["bank"], sites, grains, self.budgets(sites, grains), dense)

    def sites_and_grains(self, run: Run, state: Any) -> tuple[list[Site], list[Grain]]:
        """Return the sites of a built state and the grain of each."""
        sites = [view.site for view in state["views"]]
        return sites, [make_grain(self.grain, site, run.model) for site in sites]

    @torch.no_grad()
    def after_step(self, run: Run, state: Any) -> None:
        """Complete a decay towards 0: subtract lr * weight_decay * pretrained entry from the change.

        The optimizer's own weight decay acts on the change alone.
        """
        if self.decay == "base":
            return
        group = run.optimizer.param_groups[0]
        factor = group["lr"] * group["weight_decay"]
        if not factor:
            return
        bank: Bank = state["bank"]
        layers = patched(run.model)
        for view in state["views"]:
            if not bank.frozen[view.i]:
                pretrained = view.pretrained(layers[view.site.name].original)
                bank.slice(view.i).sub_(pretrained.float(), alpha=factor)

    @property
    def counts_exactly(self) -> bool:
        """Tell whether ``sparsity`` and the schedule determine the number of trained entries."""
        return True

    @property
    def narrows_by_value(self) -> bool:
        """Tell whether the values of the entries determine how many of them stay trained."""
        return False

    def requested(self, run: Run, state: Any, step: int) -> tuple[float, int]:
        """Return how many entries the settings ask for after ``step``, and the largest rounding error.

        ``step`` counts from 0 within the phase.
        """
        share = self.schedule.initial_density(run.total)
        if not self.narrows_by_value:
            share = scheduled_share(self.schedule, step, run.total)
        return requested_entries(self, share, *self.sites_and_grains(run, state))

    def check_trained(self, run: Run, state: Any) -> list[str]:
        if not self.counts_exactly:
            return []
        requested, slack = self.requested(run, state, run.step)
        found = state["bank"].active
        if -slack <= found - requested <= slack or (self.narrows_by_value and found < requested):
            return []
        return [
            f"{found} entries are trained, but method.sparsity={self.sparsity:g} asks for {requested:.0f}"
        ]

    def check_stored(
        self, run: Run, state: Any, shapes: Mapping[str, tuple[int, ...]], step: int
    ) -> list[str]:
        """Compare the stored entries with the request.

        More entries may be stored if those that are no longer trained keep their change.
        """
        if not self.counts_exactly or self.narrows_by_value:
            return []
        requested, slack = self.requested(run, state, step)
        found = shapes["bank.values"][0]
        may_exceed = self.schedule.dropped == "kept"
        if -slack <= found - requested <= slack or (may_exceed and found > requested):
            return []
        return [f"{found} entries are stored, but method.sparsity={self.sparsity:g} asks for {requested:.0f}"]

    def stored_shapes(self, state: nn.Module, steps: int) -> Shapes | None:
        """Return shapes for K random entries, or None if training decides how many are stored."""
        if settled_depend_on_training(self.schedule, steps):
            return None
        shapes = super().stored_shapes(state, steps)
        assert shapes is not None
        bank = state.get_submodule("bank")
        assert isinstance(bank, Bank)
        count = round(len(bank.values) / self.schedule.peak)
        neighbours = adjacent_entries(self.grain, bank.shapes)
        for name, shape in bank.packed_shapes(count, neighbours).items():
            shapes[f"bank.{name}"] = shape
        return shapes


@dataclass(frozen=True)
class Dense(Method):
    """Train every entry of the sites in place: the phase before a one-shot choice.

    Options:
        targets: Layers whose weights are trained.
    """

    targets: tuple[str, ...] = ("all",)
    name: ClassVar[str] = "dense"

    def build(self, model: nn.Module) -> InPlace:
        names = [f"{site.name}.weight" for site in find_sites(model, self.targets)]
        return InPlace(model, names, keep=False)
