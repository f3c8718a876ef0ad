"""The units that are chosen as a whole: entries, rows, columns, heads, blocks, matrices, or n of every m inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..site import Site

PATTERN = r"element|row|column|head|matrix|block:[1-9]\d*|[1-9]\d*:[1-9]\d*"


@dataclass(frozen=True)
class Grain:
    """A partition of a weight [out, in] into equal blocks, ``height`` x ``width``. With ``of``: ``best`` of every ``of`` entries of a row."""

    shape: tuple[int, int]
    height: int
    width: int
    best: int = 0
    of: int = 0

    @property
    def size(self) -> int:
        """Entries of a unit."""
        return self.height * self.width

    @property
    def units(self) -> int:
        return self.shape[0] * self.shape[1] // self.size

    def _grid(self) -> tuple[int, int, int, int]:
        return self.shape[0] // self.height, self.height, self.shape[1] // self.width, self.width

    def pool(self, scores: Tensor) -> Tensor:
        """Score by unit, [units] float32: the mean over its entries."""
        return scores.reshape(-1) if self.size == 1 else scores.reshape(self._grid()).mean((1, 3)).reshape(-1)

    def expand(self, units: Tensor) -> Tensor:
        """The flat positions of the entries of ``units``, int32, ascending."""
        if self.size == 1:
            return units
        down, right = (
            units.long() // self._grid()[2] * self.height,
            units.long() % self._grid()[2] * self.width,
        )
        rows = down[:, None, None] + torch.arange(self.height, device=units.device)[:, None]
        cols = right[:, None, None] + torch.arange(self.width, device=units.device)
        return (rows * self.shape[1] + cols).reshape(-1).sort().values.to(torch.int32)

    def members(self, index: Tensor) -> Tensor:
        """Which units hold an entry at the flat positions ``index``: [units] bool."""
        at = index.long()
        unit = at // self.shape[1] // self.height * self._grid()[2] + at % self.shape[1] // self.width
        return torch.zeros(self.units, dtype=torch.bool, device=index.device).index_fill_(0, unit, True)


def grain_of(kind: str, site: Site, model: nn.Module) -> Grain:
    """The grain ``kind`` on a site. Raises ``ConfigError`` where it does not divide the weight or means nothing there."""
    out, in_ = site.shape
    if kind == "head":
        return _heads(site, model)
    if fits := re.fullmatch(r"(\d+):(\d+)", kind):
        best, of = int(fits[1]), int(fits[2])
        if in_ % of or best >= of:
            raise ConfigError(
                f"method.grain={kind}: {site.name} has {in_} inputs; n:m needs n below m, and inputs that m divides."
            )
        return Grain(site.shape, 1, 1, best, of)
    if kind.startswith("block:"):
        side = int(kind.removeprefix("block:"))
        if out % side or in_ % side:
            raise ConfigError(
                f"method.grain={kind} does not divide the weight of {site.name}, {out} x {in_}; choose a common divisor."
            )
        return Grain(site.shape, side, side)
    height, width = {"element": (1, 1), "row": (1, in_), "column": (out, 1), "matrix": (out, in_)}[kind]
    return Grain(site.shape, height, width)


def head_width(model: nn.Module) -> int:
    """Rows of q, k, v (and columns of o) that make one attention head; 0 where the model does not say."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    heads = getattr(config, "num_attention_heads", 0) or 0
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)


def _heads(site: Site, model: nn.Module) -> Grain:
    """Heads are counted by their width, so that the fewer key and value heads of grouped-query attention come out right."""
    width, (out, in_) = head_width(model), site.shape
    if site.role not in ("q", "k", "v", "qkv", "o") or not width:
        raise ConfigError(
            f"method.grain=head: {site.name} ({site.role}) has no heads. Use method.targets=attention, and a model whose heads are known."
        )
    return Grain(site.shape, out, width) if site.role == "o" else Grain(site.shape, width, in_)
