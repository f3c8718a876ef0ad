"""A store of entries in which a site may have a low-rank branch instead.

Which sites have a branch is state. The capacity is shared and fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ..changes import Changes, LowRankChange
from ..part import Cache, Delta
from ..site import Site
from ..state import Shapes
from .bank import Bank, SparseDelta


class Mixed(Bank):
    """A bank in which some sites hold the factors of a low-rank branch instead of entries.

    The slice of such a site holds A [rank, in], followed by B [out, rank].
    """

    structured: Tensor  # [sites] bool: which sites have a branch

    def __init__(self, sites: list[Site], capacity: int, rank: int) -> None:
        super().__init__(sites, capacity)
        self.branches = [rank * sum(s.shape) for s in sites]  # number of values of each site's branch
        self.register_buffer("structured", torch.zeros(len(sites), dtype=torch.bool))

    def is_branch(self, i: int) -> bool:
        """Tell whether site ``i`` has a branch."""
        return bool(self.bounds("structured")[i])

    def positions(self, i: int) -> Tensor:
        return super().positions(i)[:0] if self.is_branch(i) else super().positions(i)

    def mix(self, index: list[Tensor], structured: Tensor) -> None:
        """Train a branch at sites that are ``structured``, and these entries at the others, all from 0."""
        slots = []
        for where, branch, size in zip(index, structured.tolist(), self.branches, strict=True):
            slots.append(torch.arange(size, dtype=torch.int32) if branch else where)
        self.place(slots)
        self.structured.copy_(structured)
        self.revision += 1

    def stored_shapes(self) -> Shapes | None:
        return None  # which sites get a branch depends on the data

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        factors = [self.slice(i) for i in self.structured.nonzero().view(-1).tolist()]
        return {
            **super().pack(),
            "structured": self.structured,
            "factors": torch.cat([self.values[:0], *factors]),
        }

    @torch.no_grad()
    def unpack(self, stored: dict[str, Tensor]) -> None:
        structured, branches = stored["structured"], torch.tensor(self.branches)
        if (
            structured.dtype != torch.bool
            or structured.shape != branches.shape
            or len(stored["factors"]) != int(branches[structured].sum())
        ):
            raise ConfigError(
                "the stored branches do not fit this model's layers. Set method.rank to that of the run."
            )
        self.structured.zero_()
        super().unpack({name: stored[name] for name in ("values", "starts", "gaps")})
        sites = range(len(branches))
        values, index = [self.slice(i) for i in sites], [self.positions(i) for i in sites]
        room = len(stored["values"]) + len(stored["factors"])
        self.values, self.index = nn.Parameter(self.values.new_zeros(room)), self.index.new_zeros(room)
        self.mix(index, structured)
        factors = stored["factors"].split(branches[structured].tolist())
        for i, factor in zip(structured.nonzero().view(-1).tolist(), factors, strict=True):
            values[i] = factor.to(values[i])
        self.values.copy_(torch.cat(values))


class MixedDelta(SparseDelta):
    """One site's view of a mixed bank: entries, or the branch B A."""

    bank: Mixed

    @property
    def additive(self) -> bool:
        return self.bank.is_branch(self.i)

    @property
    def has_effect(self) -> bool:
        return self.additive or super().has_effect

    def describe(self) -> str:
        return "a low-rank branch" if self.additive else super().describe()

    def changes(self) -> Changes:
        if not self.additive:
            return super().changes()
        a, b = self.factors()
        return Changes(factors=LowRankChange(a, b, 1.0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] of the branch."""
        (out, in_), values = self.site.shape, self.bank.slice(self.i)
        rank = len(values) // (out + in_)
        return values[: rank * in_].view(rank, in_), values[rank * in_ :].view(out, rank)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.additive:
            return super().forward(weight)
        a, b = self.factors()
        return b @ a

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        a, b = self.factors()
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        return F.linear(F.linear(x, a), b)

    def add_(self, weight: Tensor, original: Tensor, gate: float, cache: Cache = ()) -> Cache:
        if self.additive:
            return Delta.add_(self, weight, original, gate, cache)
        return super().add_(weight, original, gate, cache)
