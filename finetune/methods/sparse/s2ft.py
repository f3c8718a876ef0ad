"""S2FT: train a few heads and channels as whole rows and columns.

Attention heads and feed-forward channels are drawn at random over all layers. Their rows in the first matrix
of a coupled pair, or their columns in the second, are trained whole. ``v`` and ``o`` are shares of heads
(rows of v, columns of o), ``u`` and ``d`` shares of channels (rows of up, columns of down); each share is
drawn by itself. The gate is never trained.

Formula:
    n = int(share * pairs)        pairs: all (layer, unit) of the model; n of them are drawn, evenly
    v: rows of head h    o: columns of head h    u: row c of up    d: column c of down

Layers differ in how many units they get, and some may get none. With grouped-query attention a unit of ``v``
is one key and value head, and a unit of ``o`` is the columns of all query heads that it serves. The last
third of a fused qkv (GPT-2) is v.

Paper: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
NeurIPS 2024, arXiv 2412.06289.

Reading: The abstract and the released code were read, the body of the paper could not be. d = 0.03 alone is
what the released scripts use for Llama 3.

Rate: The released scripts have 2e-4 for commonsense and 1e-3 for mathematics, linear with 100 steps of warm-
up. That of the paper is unverified.

Differs:
- The released code permutes both sides of a pair (v with o; gate and up with down) so that the chosen units
  are neighbours, and trains a slice. The function is the same, so training the rows and columns where they
  are is too, and what is stored here fits the published weights; there the saved model stays permuted.
- With grouped-query attention the released code indexes query heads among key and value heads, and fails.
- The released efficient variant trains other sub-matrices: rows of down and o, columns of up and v.
- Selection by weight, activation or gradient, which the paper names, is left out; units are drawn at random.

Cost: in trained values for every row and out for every column, a head being as many of them as it is wide;
their gradients and two moments in Adam. Values and positions are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.attach import attach
from ...core.method import Method, Run
from ...core.site import Site, all_sites, find_sites
from ...core.sparse.bank import Bank, SparseDelta
from ...core.sparse.grain import Grain
from ...errors import ConfigError
from ...registry import register

Share = Annotated[float, Ge(0), Le(1)]
ROLES = {"v": ("v", "qkv"), "o": ("o",), "u": ("up",), "d": ("down",)}


@dataclass(frozen=True)
class Units:
    """The units of one site that may be chosen: ``count`` units of a grain, from unit ``first`` on."""

    grain: Grain
    first: int
    count: int


@dataclass(frozen=True)
class Draw:
    """A draw of ``count`` units among those of several sites: positions of the sites, and units of each."""

    sites: list[int]
    units: list[Units]
    count: int

    def most_entries(self) -> int:
        """Return how many entries the drawn units have at most; units of layers may differ in size."""
        sizes: list[int] = []
        for units in self.units:
            sizes += [units.grain.size] * units.count
        return sum(sorted(sizes, reverse=True)[: self.count])


@register("s2ft")
@dataclass(frozen=True)
class S2FT(Method):
    """S2FT: random attention heads and feed-forward channels, as whole rows and columns.

    Options:
        v: Share of the attention heads whose rows of v are trained.
        o: Share of the attention heads whose columns of o are trained.
        u: Share of the feed-forward channels whose rows of up are trained.
        d: Share of the feed-forward channels whose columns of down are trained.
    """

    v: Share = 0.0
    o: Share = 0.0
    u: Share = 0.0
    d: Share = 0.03

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "whole rows or columns of a few heads and channels, drawn over the model"
    paper: ClassVar[str] = "arXiv 2412.06289"
    size: ClassVar[str] = "d"

    def __post_init__(self) -> None:
        if not any(self.shares.values()):
            raise ValueError("method.v, o, u and d are all 0, so nothing would be trained; raise one.")

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
        for draw in self.plan_draws(run.model, sites):
            counts = [units.count for units in draw.units]
            drawn = torch.zeros(sum(counts), dtype=torch.bool)
            drawn[torch.randperm(len(drawn), generator=run.generator)[: draw.count]] = True
            for i, units, own in zip(draw.sites, draw.units, drawn.split(counts), strict=True):
                numbers = (own.nonzero().view(-1) + units.first).to(torch.int32)
                index[i] = units.grain.expand(numbers).to(bank.index.device)
        bank.place([index[i] for i in range(len(sites))])

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the layers that have a share. Raises ``ConfigError`` for a share without layers."""
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

        Raises ``ConfigError`` for a share of less than one unit, and if the model's heads are needed and
        unknown.
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
