"""Units of a weight that are chosen as a whole: entries, rows, heads and others, or n of every m inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..anatomy import find_head_width
from ..site import Site

PATTERN = r"element|row|column|head|matrix|block:[1-9]\d*|[1-9]\d*:[1-9]\d*"
N_OF_M = r"(\d+):(\d+)"
ROLES_WITH_HEADS = ("q", "k", "v", "qkv", "o")


@dataclass(frozen=True)
class Grain:
    """A partition of a weight of ``shape`` [out, in] into equal units of ``height`` x ``width`` entries.

    Units are numbered row by row. If ``m`` is not 0, the units are single entries, and the best ``n`` of
    every ``m`` in a row are chosen.
    """

    shape: tuple[int, int]
    height: int
    width: int
    n: int = 0
    m: int = 0

    @property
    def size(self) -> int:
        """Number of entries in a unit."""
        return self.height * self.width

    @property
    def units(self) -> int:
        """Number of units."""
        return self.shape[0] * self.shape[1] // self.size

    @property
    def across(self) -> int:
        """Number of units in one row of units."""
        return self.shape[1] // self.width

    def pool(self, scores: Tensor) -> Tensor:
        """Return the mean score of each unit, [units] float32, from ``scores`` [out, in].

        A unit of one entry needs no mean: the result then shares the memory of ``scores``.
        """
        if self.size == 1:
            return scores.reshape(-1)
        down = self.shape[0] // self.height
        return scores.reshape(down, self.height, self.across, self.width).mean((1, 3)).reshape(-1)

    def expand(self, units: Tensor) -> Tensor:
        """Return the flat positions of the entries of ``units`` [count], int32, ascending."""
        if self.size == 1:
            return units
        top = units.long() // self.across * self.height
        left = units.long() % self.across * self.width
        rows = top[:, None, None] + torch.arange(self.height, device=units.device)[:, None]
        cols = left[:, None, None] + torch.arange(self.width, device=units.device)
        return (rows * self.shape[1] + cols).reshape(-1).sort().values.to(torch.int32)

    def members(self, index: Tensor) -> Tensor:
        """Return which units hold an entry at one of the flat positions ``index`` [count]: [units] bool."""
        at = index.long()
        row, col = at // self.shape[1], at % self.shape[1]
        unit = row // self.height * self.across + col // self.width
        return torch.zeros(self.units, dtype=torch.bool, device=index.device).index_fill_(0, unit, True)


def make_grain(kind: str, site: Site, model: nn.Module) -> Grain:
    """Return the grain called ``kind`` for the weight of a site.

    Raises ``ConfigError`` if its units do not divide the weight, or if the site has no such units.
    """
    out, in_ = site.shape
    if kind == "head":
        return _head_grain(site, model)
    if match := re.fullmatch(N_OF_M, kind):
        n, m = int(match[1]), int(match[2])
        if in_ % m or n >= m:
            raise ConfigError(
                f"method.grain={kind}: {site.name} has {in_} inputs; n:m needs n below m, and a number "
                "of inputs that is divisible by m."
            )
        return Grain(site.shape, 1, 1, n, m)
    if kind.startswith("block:"):
        side = int(kind.removeprefix("block:"))
        if out % side or in_ % side:
            raise ConfigError(
                f"method.grain={kind} does not divide the weight of {site.name}, {out} x {in_}; "
                "choose a common divisor of the two sizes."
            )
        return Grain(site.shape, side, side)
    height, width = {"element": (1, 1), "row": (1, in_), "column": (out, 1), "matrix": (out, in_)}[kind]
    return Grain(site.shape, height, width)


def _head_grain(site: Site, model: nn.Module) -> Grain:
    """Return a grain with one unit per head: rows of q, k, v or qkv, columns of o.

    Units are counted by the width of a head, not by the number of query heads: with grouped-query attention k
    and v have fewer heads than q.
    """
    width, (out, in_) = find_head_width(model), site.shape
    if site.role not in ROLES_WITH_HEADS or not width:
        raise ConfigError(
            f"method.grain=head: {site.name} ({site.role}) has no heads. Use method.targets=attention, and a "
            "model whose configuration gives the width or the number of its heads."
        )
    if site.role == "o":
        return Grain(site.shape, out, width)
    return Grain(site.shape, width, in_)
