"""S2FT: train a few heads and channels as whole rows and columns.

Attention heads and feed-forward channels are chosen over all layers: drawn at random, or by a score. A chosen
unit trains all of its rows in the first matrix of a coupled pair, or all of its columns in the second. ``v``
and ``o`` are shares of the heads (rows of v, columns of o), ``u`` and ``d`` shares of the channels (rows of
up, columns of down); the units of each share are chosen separately. The gate is never trained.

Formula:
    n = int(share * pairs)        pairs: all (layer, unit) pairs of the model, of which n are chosen
    random: each pair with the same chance
    weight: mean |w|     gradient: mean |g|     of the entries of the unit's rows or columns
    activation: mean |y| of the unit's rows, mean |x| of its columns, x -> y the layer, over all tokens
    v: rows of head h    o: columns of head h    u: row c of up    d: column c of down

Layers differ in how many units they get, and some may get none. With grouped-query attention a unit of ``v``
is one key-value head, and a unit of ``o`` holds the columns of all query heads that share a key-value head.
The last third of a fused qkv (GPT-2) is v.

Paper: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
NeurIPS 2024, arXiv 2412.06289.

Reading: The abstract and the released code were read; the body of the paper was not available. d = 0.03 and
no other share is the setting of the released scripts for Llama 3. The paper names selection by the largest or
smallest weight, activation and gradient; measuring them by means of absolute values is a choice of this
project.

Rate: The released scripts have 2e-4 for commonsense and 1e-3 for mathematics, linear, with a warm-up of 100
steps. The rate of the paper is unverified.

Differs:
- The released code permutes both sides of a pair (v with o; gate and up with down) so that the chosen units
  are neighbours, and trains a slice. The permuted model computes the same function, so training the rows and
  columns in their places is equivalent. Here the stored change fits the published weights; the model that the
  released code saves stays permuted.
- With grouped-query attention the released code uses indices of query heads for key-value heads, and fails.
- The released efficient variant trains other sub-matrices: rows of down and o, columns of up and v.

Cost: ``in`` trained values for every row and ``out`` for every column, where a head has head_dim rows or
columns; their gradients and two moments in Adam. Values and positions are stored. A choice by activation
costs one forward pass for each of ``batches`` steps, one by gradient a backward pass or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.attach import attach, patched
from ...core.method import Method, Run
from ...core.site import Site, all_sites, find_sites
from ...core.sparse.bank import Bank, SparseDelta
from ...core.sparse.grain import Grain
from ...core.sparse.probe import scan_scores
from ...core.statistics import gather_statistics
from ...errors import ConfigError
from ...registry import register

Share = Annotated[float, Ge(0), Le(1)]
ROLES = {"v": ("v", "qkv"), "o": ("o",), "u": ("up",), "d": ("down",)}
FIRST = ("v", "qkv", "up")  # the first layers of coupled pairs, whose units are rows
SCORES = {"weight": "magnitude", "gradient": "gradient"}  # the score of single entries, by criterion


@dataclass(frozen=True)
class Units:
    """The units of one site that may be chosen: ``count`` units of ``grain``, from unit ``first`` on."""

    grain: Grain
    first: int
    count: int


@dataclass(frozen=True)
class Draw:
    """A choice of ``count`` units among those of several sites: positions of the sites, and units of each."""

    sites: list[int]
    units: list[Units]
    count: int

    def most_entries(self) -> int:
        """Return the largest possible number of chosen entries; units of two layers may differ in size."""
        sizes: list[int] = []
        for units in self.units:
            sizes += [units.grain.size] * units.count
        return sum(sorted(sizes, reverse=True)[: self.count])


@register("s2ft")
@dataclass(frozen=True)
class S2FT(Method):
    """S2FT: a few attention heads and feed-forward channels, as whole rows and columns.

    Options:
        v: Share of the attention heads whose rows of v are trained.
        o: Share of the attention heads whose columns of o are trained.
        u: Share of the feed-forward channels whose rows of up are trained.
        d: Share of the feed-forward channels whose columns of down are trained.
        criterion: How units are chosen: at ``random``, or by the mean absolute ``weight``, ``activation`` or
            ``gradient``.
        direction: Whether units with the largest or with the smallest means are trained.
        batches: Number of batches, one per step, that give the activations or the gradients.
    """

    v: Share = 0.0
    o: Share = 0.0
    u: Share = 0.0
    d: Share = 0.03
    criterion: Literal["random", "weight", "activation", "gradient"] = "random"
    direction: Literal["largest", "smallest"] = "largest"
    batches: Annotated[int, Ge(1)] = 1

    selection: ClassVar[str] = "eval"
    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "whole rows or columns of a few heads and channels, chosen over the model"
    paper: ClassVar[str] = "arXiv 2412.06289"
    size: ClassVar[str] = "d"

    def __post_init__(self) -> None:
        if not any(self.shares.values()):
            raise ValueError("method.v, o, u and d are all 0, so nothing would be trained; raise one.")
        if self.criterion == "random" and self.direction == "smallest":
            raise ValueError(
                "method.direction=smallest has no effect with criterion=random; take another criterion."
            )
        if self.criterion in ("random", "weight") and self.batches > 1:
            raise ValueError(
                f"method.batches={self.batches} has no effect with criterion={self.criterion}; take "
                "criterion=activation or gradient."
            )

    @property
    def reads_gradients(self) -> bool:
        return self.criterion == "gradient"

    @property
    def score(self) -> str:
        """Return the score of single entries that the criterion averages."""
        return SCORES[self.criterion]

    @property
    def shares(self) -> dict[str, float]:
        """Return the four shares by their names."""
        return {name: getattr(self, name) for name in ROLES}

    def build(self, model: nn.Module) -> nn.ModuleDict:
        sites = self.sites(model)
        bank = Bank(sites, sum(draw.most_entries() for draw in self.plan_draws(model, sites)))
        views = [SparseDelta(bank, i, site) for i, site in enumerate(sites)]
        for site, view in zip(sites, views, strict=True):
            attach(model, site.name, view)
        return nn.ModuleDict({"bank": bank, "views": nn.ModuleList(views)})

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        bank: Bank = state["bank"]
        sites = self.sites(run.model)
        index: dict[int, Tensor] = {}
        draws = list(self.plan_draws(run.model, sites))
        scores = {} if self.criterion == "random" else self.score_units(run, bank, sites, draws)
        for draw in draws:
            counts = [units.count for units in draw.units]
            if scores:
                every = torch.cat([scores[i] for i in draw.sites])
                order = every.sort(descending=self.direction == "largest", stable=True).indices
            else:
                order = torch.randperm(sum(counts), generator=run.generator)
            chosen = torch.zeros(sum(counts), dtype=torch.bool)
            chosen[order[: draw.count]] = True
            for i, units, own in zip(draw.sites, draw.units, chosen.split(counts), strict=True):
                numbers = (own.nonzero().view(-1) + units.first).to(torch.int32)
                index[i] = units.grain.expand(numbers).to(bank.index.device)
        bank.place([index[i] for i in range(len(sites))])

    def score_units(self, run: Run, bank: Bank, sites: list[Site], draws: list[Draw]) -> dict[int, Tensor]:
        """Return the scores of every site's units, on the CPU, by the site's position."""
        units: dict[int, Units] = {}
        for draw in draws:
            units |= dict(zip(draw.sites, draw.units, strict=True))
        found: dict[int, Tensor] = {}

        def keep_means(i: int, score: Tensor) -> None:
            first = units[i].first
            found[i] = units[i].grain.pool(score)[first : first + units[i].count].cpu()

        if self.criterion == "activation":
            for i, means in enumerate(mean_activations(run, sites, self.batches)):
                by_row = means if sites[i].role in FIRST else means.T
                keep_means(i, by_row.expand(sites[i].shape).float())
        else:
            layers = patched(run.model)
            sought = [layers[site.name] for site in sites]
            scan_scores(self, run, bank, sought, [None] * len(sites), keep_means)
        return found

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the layers with a share above 0. Raises ``ConfigError`` if the model lacks such a layer."""
        present = {site.role for site in all_sites(model)}
        targets: list[str] = []
        faults: list[str] = []
        for name, share in self.shares.items():
            roles = [role for role in ROLES[name] if role in present]
            if share and not roles:
                wanted = " or ".join(ROLES[name])
                faults.append(
                    f"method.{name}={share:g}: this model has no layer of role {wanted}; set it to 0."
                )
            if share:
                targets += roles
        if faults:
            raise ConfigError(*faults)
        return find_sites(model, tuple(targets))

    def plan_draws(self, model: nn.Module, sites: list[Site]) -> Iterator[Draw]:
        """Yield one draw for each share above 0.

        Raises ``ConfigError`` for a share of less than one unit, and if a share of the heads is asked for and
        the model's heads are unknown.
        """
        for name, share in self.shares.items():
            if not share:
                continue
            members = [i for i, site in enumerate(sites) if site.role in ROLES[name]]
            anatomy = Anatomy.of(model) if name in "vo" else None
            units = [find_units(sites[i], anatomy) for i in members]
            total = sum(each.count for each in units)
            if not int(share * total):
                what = "heads" if name in "vo" else "channels"
                raise ConfigError(
                    f"method.{name}={share:g} of the model's {total} {what} is less than one; take "
                    f"{1 / total:.2g} or more."
                )
            yield Draw(members, units, int(share * total))


def mean_activations(run: Run, sites: list[Site], batches: int) -> list[Tensor]:
    """Return the mean absolute outputs [out, 1] of first layers of pairs, and inputs [in, 1] of second ones.

    The mean is over the tokens of the next ``batches`` steps, without padding, in eval mode.
    """
    seen = []
    for step in run.upcoming(batches):
        seen += step
    found = gather_statistics(run.model, sites, ("input_abs", "output_abs"), seen, run.logits)
    means = []
    for site in sites:
        statistics = found[site.name]
        total = statistics["output_abs" if site.role in FIRST else "input_abs"]
        means.append(total[:, None] / statistics.tokens)
    return means


def find_units(site: Site, anatomy: Anatomy | None) -> Units:
    """Return the units of a site.

    They are channels of up and down, or heads of v, qkv and o, for which ``anatomy`` is given.
    """
    out, in_ = site.shape
    if site.role == "up":
        return Units(Grain(site.shape, 1, in_), 0, out)
    if site.role == "down":
        return Units(Grain(site.shape, out, 1), 0, in_)
    assert anatomy is not None
    if site.role == "o":
        return Units(Grain(site.shape, out, in_ // anatomy.kv_heads), 0, anatomy.kv_heads)
    first = 2 * anatomy.heads if site.role == "qkv" else 0
    return Units(Grain(site.shape, anatomy.head_dim, in_), first, anatomy.kv_heads)
