"""S2FT: train a few heads and channels, whole, across coupled layers (Yang et al., 2024, arXiv 2412.06289; the abstract and the code were read).

``v`` and ``o`` are shares of attention heads (rows of v, columns of o), ``u`` and ``d`` of feed-forward channels (rows of up, columns of down); d
alone by default, as released for Llama 3. Of all (layer, unit) pairs of the model int(share * pairs) are drawn, evenly, for each share by itself, so
that layers differ and may get none. The gate is never trained.

The released code first permutes both sides of a pair, v with o and gate and up with down, into [only first] [both] [only second] [rest], and trains a
slice. That leaves the function as it is: training the same rows and columns where they are is the same, and what is stored belongs to the published
weights. With grouped queries a head of v is one key and value head, and one of o the columns of all queries that it serves (the released code indexes
query heads there, and fails). Of a fused qkv, as in GPT-2, the last third is v.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ...core.method import Method, Run
from ...core.part import attach
from ...core.site import Site, all_sites, find_sites
from ...core.sparse.bank import Bank, SparseDelta
from ...core.sparse.grain import Grain, head_width
from ...errors import ConfigError
from ...registry import register

Share = Annotated[float, Ge(0), Le(1)]
ROLES = {"v": ("v", "qkv"), "o": ("o",), "u": ("up",), "d": ("down",)}


@dataclass(frozen=True)
class Units:
    """The ``count`` units of a site that may be chosen, of which ``first`` is the first of its grain."""

    grain: Grain
    first: int
    count: int


@register("s2ft")
@dataclass(frozen=True)
class S2FT(Method):
    """S2FT: random attention heads and feed-forward channels, as whole rows and columns."""

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
        return {name: getattr(self, name) for name in ROLES}

    def build(self, model: nn.Module) -> nn.ModuleDict:
        sites = self.sites(model)
        bank = Bank(sites, sum(self._largest(units, count) for _, units, count in self.draws(model, sites)))
        views = [SparseDelta(bank, i, s) for i, s in enumerate(sites)]
        for site, view in zip(sites, views, strict=True):
            attach(model, site.name, view)
        return nn.ModuleDict({"bank": bank, "views": nn.ModuleList(views)})

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        sites = self.sites(run.model)
        index: dict[int, Tensor] = {}
        for places, units, count in self.draws(run.model, sites):
            counts = [u.count for u in units]
            picked = torch.zeros(sum(counts), dtype=torch.bool)
            picked[torch.randperm(len(picked), generator=run.generator)[:count]] = True
            for i, unit, own in zip(places, units, picked.split(counts), strict=True):
                index[i] = unit.grain.expand((own.nonzero().view(-1) + unit.first).to(torch.int32)).to(
                    state["bank"].index.device
                )
        state["bank"].place([index[i] for i in range(len(sites))])

    def sites(self, model: nn.Module) -> list[Site]:
        """The layers that have a share. Raises ``ConfigError`` where a share has none, or would choose no unit of them."""
        roles = {site.role for site in all_sites(model)}
        absent = [name for name, share in self.shares.items() if share and not roles & set(ROLES[name])]
        if absent:
            whys = {name: f"this model has no layer of role {' or '.join(ROLES[name])}" for name in absent}
            raise ConfigError(
                *(f"method.{name}={self.shares[name]:g}: {why}; set it to 0." for name, why in whys.items())
            )
        return find_sites(
            model, tuple(r for name, share in self.shares.items() if share for r in ROLES[name] if r in roles)
        )

    def draws(self, model: nn.Module, sites: list[Site]) -> Iterator[tuple[list[int], list[Units], int]]:
        """For each share the places of its sites, their units, and how many of all these are trained."""
        for name, share in self.shares.items():
            places = [i for i, site in enumerate(sites) if site.role in ROLES[name]]
            units = [_units(sites[i], model) for i in places] if share else []
            total = sum(u.count for u in units)
            if share and not int(share * total):
                what = "heads" if name in "vo" else "channels"
                raise ConfigError(
                    f"method.{name}={share:g} of the model's {total} {what} is none; take {1 / total:.2g} or more."
                )
            if share:
                yield places, units, int(share * total)

    @staticmethod
    def _largest(units: list[Units], count: int) -> int:
        """Entries of ``count`` units at most: layers may differ in size."""
        return sum(sorted((u.grain.size for u in units for _ in range(u.count)), reverse=True)[:count])


def _units(site: Site, model: nn.Module) -> Units:
    """What of a site is chosen as a whole. Raises ``ConfigError`` where its heads are not known."""
    out, in_ = site.shape
    if site.role in ("up", "down"):
        return (
            Units(Grain(site.shape, 1, in_), 0, out)
            if site.role == "up"
            else Units(Grain(site.shape, out, 1), 0, in_)
        )
    width = head_width(model)
    rows = {s.block: s.shape[0] for s in all_sites(model) if s.role == "v"}.get(
        site.block, in_ if site.role == "o" else out
    )  # of v, by its block
    if not width or out % width or in_ % width or rows % width or (site.role == "qkv" and out != 3 * in_):
        raise ConfigError(
            f"method.v and method.o choose heads, and those of {site.name} ({out} x {in_}) are not known. Use u and d."
        )
    if site.role == "o":
        heads = rows // width
        return Units(Grain(site.shape, out, in_ // heads), 0, heads)
    heads = out // width
    return (
        Units(Grain(site.shape, width, in_), heads * 2 // 3, heads // 3)
        if site.role == "qkv"
        else Units(Grain(site.shape, width, in_), 0, heads)
    )
