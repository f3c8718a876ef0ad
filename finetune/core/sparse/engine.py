"""The sparse engine: which entries of the weights are trained is a product of score, direction, scope, grain and schedule.

score      what entries are chosen by (``scores.py``)
direction  the largest or the smallest scores
scope      what competes for one budget: the entries of a matrix, of all matrices of a role or of a block, or of the model; or each matrix for a
           budget of its own, in proportion to its mean score (``layer``)
grain      what is chosen as a whole (``grain.py``)
schedule   when the choice is made again (``schedule.py``)

Published methods are presets of it. The values are the change, from 0, in float32; the base stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from ..inplace import InPlace
from ..method import Method, Phase, Run
from ..part import attach, patched
from ..site import Site, find_sites
from ..state import Shapes
from .bank import Bank, SparseDelta
from .grain import PATTERN, Grain, grain_of
from .probe import scan
from .schedule import Move, Schedule
from .scores import SCORES
from .select import TopK, apportion

Direction = Literal["largest", "smallest"]
Scope = Literal["matrix", "role", "block", "model", "layer"]
ScoreName = Literal[
    "random", "magnitude", "change", "gradient", "gradient_weight", "snip", "fisher", "sensitivity", "d3", "lowrank_magnitude", "principal",
    "off_principal",
]  # fmt: skip
Allowed = Callable[[int], Tensor | None]
Offer = Callable[[Callable[[int, Tensor], None]], Any]  # calls its argument with every site and its score


@dataclass(frozen=True)
class Sparse(Method):
    """K existing entries of the weights: the count of the scope's entries minus the share ``sparsity`` of it, rounded.

    ``batches``: how many steps' batches a score of gradients looks at. ``rank``, ``power`` and ``eps`` belong to some scores. ``decay``: weight decay
    pulls the trained entries towards the pretrained weights (``base``) or towards 0 (``zero``).
    """

    targets: tuple[str, ...] = ("all",)
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.98
    score: ScoreName = "random"
    direction: Direction = "largest"
    scope: Scope = "matrix"
    grain: str = "element"
    schedule: Schedule = field(kw_only=True)
    decay: Literal["base", "zero"] = "base"
    batches: Annotated[int, Ge(1)] = 1
    rank: Annotated[int, Ge(1)] = 64
    power: Annotated[float, Ge(0)] = 1.0
    eps: Annotated[float, Gt(0)] = 1e-3

    family: ClassVar[str] = "sparse delta"
    size: ClassVar[str] = "sparsity"

    def __post_init__(self) -> None:
        faults = list(self._misfits())
        if faults:
            raise ValueError(" ".join(faults))

    def _misfits(self) -> list[str]:
        """Settings that contradict each other, or would be ignored."""
        found, uses = list[str](), SCORES[self.score].uses
        for name in ("batches", "rank", "power", "eps"):
            if name not in uses and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                users = ", ".join(n for n, s in SCORES.items() if name in s.uses)
                found.append(
                    f"method.{name}={getattr(self, name)} means nothing to score={self.score}; it belongs to {users}."
                )
        if not re.fullmatch(PATTERN, self.grain):
            found.append(
                f"method.grain={self.grain} is not a grain; there are element, row, column, head, matrix, block:B (as block:16) and N:M (as 2:4)."
            )
        elif fits := re.fullmatch(r"(\d+):(\d+)", self.grain):
            share = 1 - int(fits[1]) / int(fits[2])
            if share <= 0:
                found.append(f"method.grain={self.grain} leaves nothing out; n:m needs n below m, as 2:4.")
            elif abs(self.sparsity - share) > 1e-6:
                found.append(
                    f"method.grain={self.grain} trains {fits[1]} of {fits[2]} entries: sparsity={self.sparsity:g} must be {share:g}."
                )
            if self.scope != "matrix":
                found.append(
                    f"method.grain={self.grain} fixes the count in every row; scope={self.scope} cannot move it, so take scope=matrix."
                )
            if self.schedule.name not in ("static", "one_shot", "redraw"):
                found.append(
                    f"method.grain={self.grain} fixes the count in every row, which schedule={self.schedule.name} would break."
                )
        if self.grain == "matrix" and self.scope in ("matrix", "layer"):
            found.append(
                f"method.grain=matrix leaves scope={self.scope} nothing to choose from within a matrix. Take scope=role, block or model."
            )
        if self.scope == "layer" and (
            self.direction == "smallest" or self.score in ("gradient_weight", "off_principal")
        ):
            what = f"score={self.score} with direction={self.direction}"
            found.append(
                f"scope=layer divides by the mean of scores that are never negative; {what} has none. Take scope=matrix or scope=model."
            )
        if self.score == "change" and not self.schedule.dense and self.schedule.name in ("static", "grow"):
            found.append(
                f"score=change is 0 everywhere before training; schedule={self.schedule.name} has no dense phase. Take schedule=one_shot."
            )
        return found

    def faults(self, steps: int) -> list[str]:
        return self.schedule.faults(steps)

    def ready(self, step: int, total: int) -> bool:
        return self.schedule.ready(step, total)

    def phases(self) -> tuple[Phase, ...]:
        dense = self.schedule.dense
        return (
            (Phase(Dense(targets=self.targets), dense), Phase(self, 1 - dense))
            if dense
            else (Phase(self, 1.0),)
        )

    def budgets(self, sites: list[Site], grains: list[Grain]) -> list[tuple[list[int], int]]:
        """The sites that compete with each other, and how many of their entries may change: at least one unit."""
        groups: dict[Any, list[int]] = {}
        for i, site in enumerate(sites):
            key = {"matrix": i, "layer": "all", "role": site.role, "block": site.block, "model": "all"}[
                self.scope
            ]
            groups.setdefault(key, []).append(i)
        found = []
        for members in groups.values():
            size = sum(sites[i].size for i in members)
            k, units = size - round(self.sparsity * size), {grains[i].size for i in members}
            if grains[members[0]].of:  # sparsity says it only nearly
                k = sum(sites[i].size // grains[i].of * grains[i].best for i in members)
            unit = min(units)
            found.append((members, max(round(k / unit), 1) * unit if len(units) == 1 else max(k, unit)))
        return found

    def build(self, model: nn.Module) -> nn.ModuleDict:
        sites = find_sites(model, self.targets)
        grains = [grain_of(self.grain, s, model) for s in sites]
        capacity = sum(
            self._count(members, k, self.schedule.peak, sites, grains)
            for members, k in self.budgets(sites, grains)
        )
        bank = Bank(sites, capacity)
        views = [SparseDelta(bank, i, s) for i, s in enumerate(sites)]
        for site, view in zip(sites, views, strict=True):
            attach(model, site.name, view)
        return nn.ModuleDict({"bank": bank, "views": nn.ModuleList(views)})

    @staticmethod
    def _count(members: list[int], k: int, share: float, sites: list[Site], grains: list[Grain]) -> int:
        """Entries of a group that are trained at a ``share`` of its budget: whole units, where they are of one size."""
        unit = min(grains[i].size for i in members)
        return min(max(round(share * k / unit), 1) * unit, sum(sites[i].size for i in members))

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        state["bank"].place(self._choose(run, state, self.schedule.first(run.total), previous=previous))

    def before_step(self, run: Run, state: Any) -> None:
        move = self.schedule.move(run.step, run.total) if run.step else None
        if move:
            bank: Bank = state["bank"]
            chosen = self._choose(run, state, move.density) if move.redraw else self._moved(run, state, move)
            fresh = bank.revise(chosen, run.moments(bank.values), self.schedule.dropped)
            run.log(churn=len(fresh) / max(1, bank.active), trained=float(bank.active))

    def after_step(self, run: Run, state: Any) -> None:
        """The part of a decay towards 0 that the optimizer, which decays the change, leaves out: lr * decay * w_0."""
        group = run.optimizer.param_groups[0]
        pull = group["lr"] * group["weight_decay"] if self.decay == "zero" else 0.0
        if pull:
            decay_base_(run.model, state, pull)

    @property
    def counts_exactly(self) -> bool:
        """Whether ``sparsity`` and the schedule say how many entries are trained."""
        return True

    @property
    def narrows_by_value(self) -> bool:
        """Whether the values of the entries decide how many of them stay trained."""
        return False

    def requested(self, run: Run, state: Any, step: int) -> tuple[float, int]:
        """Return how many entries the settings ask for after ``step``, and by how much rounding may miss it.

        ``step`` counts from 0 within the phase. Rounding may miss by one unit a layer.
        """
        share = self.schedule.first(run.total)
        if not self.narrows_by_value:
            for earlier in range(1, step + 1):
                if (move := self.schedule.move(earlier, run.total)) is not None:
                    share = move.density
        sites, grains = self._sites(run, state)
        unit = max(grain.size for grain in grains)
        return (1 - self.sparsity) * share * sum(site.size for site in sites), unit * len(sites)

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
        """Entries that are no longer trained may have kept their change: then more are stored than requested."""
        if not self.counts_exactly or self.narrows_by_value:
            return []
        requested, slack = self.requested(run, state, step)
        found = shapes["bank.values"][0]
        may_exceed = self.schedule.dropped == "kept"
        if -slack <= found - requested <= slack or (may_exceed and found > requested):
            return []
        return [f"{found} entries are stored, but method.sparsity={self.sparsity:g} asks for {requested:.0f}"]

    def stored_shapes(self, state: nn.Module, steps: int) -> Shapes | None:
        """Expect K entries in random places. None if entries that come in later are stored beside those that left."""
        if self.schedule.dropped == "kept":
            for step in range(1, steps):
                move = self.schedule.move(step, steps)
                if move and (move.redraw or (move.drop and move.by == "change")):
                    return None
        shapes = super().stored_shapes(state, steps)
        assert shapes is not None
        bank = state.get_submodule("bank")
        assert isinstance(bank, Bank)
        count = round(len(bank.values) / self.schedule.peak)
        for name, shape in bank.packed_shapes(count, self._neighbours(bank.shapes)).items():
            shapes[f"bank.{name}"] = shape
        return shapes

    def _neighbours(self, shapes: list[tuple[int, int]]) -> int:
        """How many neighbours in memory are chosen together: the least over the weights ``shapes``."""
        if self.grain.startswith("block:"):
            return int(self.grain.removeprefix("block:"))
        if self.grain in ("row", "head"):
            return min(in_ for _, in_ in shapes)
        if self.grain == "matrix":
            return min(out * in_ for out, in_ in shapes)
        return 1

    def _sites(self, run: Run, state: Any) -> tuple[list[Site], list[Grain]]:
        sites = [view.site for view in state["views"]]
        return sites, [grain_of(self.grain, site, run.model) for site in sites]

    def _moved(self, run: Run, state: Any, move: Move) -> list[Tensor]:
        """The entries that stay, and the best of the others in the room that is left."""
        bank: Bank = state["bank"]
        sites, grains = self._sites(run, state)

        def trained(i: int) -> Tensor:
            return grains[i].members(bank.where(i))

        budgets = self.budgets(sites, grains)
        rooms = [self._count(members, k, move.density, sites, grains) for members, k in budgets]
        if self.scope == "layer":  # each keeps its part
            counts = [len(bank.where(i)) for i in range(len(sites))]
            rooms = _divide(rooms[0], torch.tensor(counts), [s.size for s in sites], grains)
            budgets = [([i], k) for i, k in enumerate(rooms)]
        keeps = []
        for (members, _), room in zip(budgets, rooms, strict=True):
            now = sum(len(bank.where(i)) for i in members)
            keeps.append(min(now - round(move.drop * now), room))
        if move.by == "score" and all(room <= keep for room, keep in zip(rooms, keeps, strict=True)):
            return self._choose(
                run, state, move.density, trained
            )  # narrowing: the best of the trained ones by score
        kept = _best(budgets, keeps, grains, lambda offer: _offer_changes(bank, grains, offer), trained)
        rooms = [
            room - sum(len(kept[i]) for i in members)
            for room, (members, _) in zip(rooms, budgets, strict=True)
        ]
        grown = _best(
            budgets, rooms, grains, self._scan(run, state, None), lambda i: ~grains[i].members(kept[i])
        )
        return [run.agree(torch.cat([kept[i], grown[i]]).sort().values) for i in range(len(sites))]

    def _scan(self, run: Run, state: Any, previous: Any) -> Callable[[Callable[[int, Tensor], None]], Any]:
        """Offers the scores of every site, the better the larger."""
        sites, layers = self._sites(run, state)[0], patched(run.model)
        dense = {}
        if isinstance(previous, InPlace):
            dense = {s.name: s.as_matrix(previous.trained()[f"{s.name}.weight"]) for s in sites}

        def offer_to(offer: Callable[[int, Tensor], None]) -> None:
            def better(i: int, score: Tensor) -> None:
                offer(i, score.neg_() if self.direction == "smallest" else score)

            scan(
                self,
                run,
                state["bank"],
                [layers[s.name] for s in sites],
                [dense.get(s.name) for s in sites],
                better,
            )

        return offer_to

    def _choose(
        self, run: Run, state: Any, share: float, allowed: Allowed = lambda i: None, previous: Any = None
    ) -> list[Tensor]:
        """The best entries of each site by the score, at a ``share`` of the budgets."""
        sites, grains = self._sites(run, state)
        offer = self._scan(run, state, previous)
        budgets = self.budgets(sites, grains)
        counts = [self._count(members, k, share, sites, grains) for members, k in budgets]
        if self.scope == "layer":
            means: dict[int, Tensor] = {}
            offer(lambda i, score: means.__setitem__(i, score.mean().clamp(min=0).cpu()))
            weights = torch.stack([means[i] * s.size for i, s in enumerate(sites)])
            caps = [
                s.size if (open_ := allowed(i)) is None else int(open_.sum()) * grains[i].size
                for i, s in enumerate(sites)
            ]
            counts = _divide(counts[0], weights, caps, grains)
            budgets = [([i], k) for i, k in enumerate(counts)]
        return [run.agree(c) for c in _best(budgets, counts, grains, offer, allowed)]


@dataclass(frozen=True)
class Dense(Method):
    """Every entry of the sites, in place: the phase before a one-shot choice."""

    targets: tuple[str, ...] = ("all",)
    name: ClassVar[str] = "dense"

    def build(self, model: nn.Module) -> InPlace:
        return InPlace(model, [f"{s.name}.weight" for s in find_sites(model, self.targets)], keep=False)


def _divide(k: int, weights: Tensor, caps: list[int], grains: list[Grain]) -> list[int]:
    """K entries among the sites in proportion to ``weights``, in whole units where these are of one size."""
    unit = grains[0].size if len({g.size for g in grains}) == 1 else 1
    return [unit * n for n in apportion(k // unit, weights, [cap // unit for cap in caps])]


def _best(
    groups: list[tuple[list[int], int]],
    counts: list[int],
    grains: list[Grain],
    offer: Offer,
    allowed: Allowed,
) -> list[Tensor]:
    """The best ``counts`` of each group's entries, in whole units, among the allowed units: flat positions by site, ascending."""
    tops: dict[int, TopK] = {}
    for (members, _), k in zip(groups, counts, strict=True):
        tops |= dict.fromkeys(members, TopK(k, {i: grains[i].size for i in members}))
    fixed: dict[int, Tensor] = {}

    def add(i: int, score: Tensor) -> None:
        if grains[i].of:
            fixed[i] = _n_of_m(score, grains[i])
        else:
            tops[i].add(i, grains[i].pool(score), allowed(i))

    offer(add)
    taken: dict[int, Tensor] = {}
    for top in dict.fromkeys(tops.values()):
        taken |= top.take()
    return [fixed[i] if i in fixed else g.expand(taken[i]) for i, g in enumerate(grains)]


def _n_of_m(score: Tensor, grain: Grain) -> Tensor:
    """The best n of every m inputs, as flat positions."""
    if score.isnan().any():
        raise ValueError("a score is NaN")
    best = score.reshape(-1, grain.of).sort(dim=-1, descending=True, stable=True).indices[:, : grain.best]
    start = torch.arange(len(best), device=best.device)[:, None] * grain.of
    return (best + start).reshape(-1).sort().values.to(torch.int32)


@torch.no_grad()
def decay_base_(model: nn.Module, state: Any, pull: float) -> None:
    """Subtract ``pull`` times the pretrained entry from every trained value."""
    bank: Bank = state["bank"]
    for layer in patched(model).values():
        for view in layer.deltas:
            if isinstance(view, SparseDelta) and view.bank is bank and not bank.frozen[view.i]:
                bank.slice(view.i).sub_(view.pretrained(layer.original).float(), alpha=pull)


def _offer_changes(bank: Bank, grains: list[Grain], offer: Callable[[int, Tensor], None]) -> None:
    for i, grain in enumerate(grains):
        offer(i, _changes(bank, i, grain))


def _changes(bank: Bank, i: int, grain: Grain) -> Tensor:
    """|change| of site ``i``'s trained entries, 0 elsewhere, [out, in]."""
    dense = torch.zeros(grain.shape, device=bank.values.device)
    dense.view(-1)[bank.where(i).long()] = bank.slice(i).detach().abs().float()
    return dense
