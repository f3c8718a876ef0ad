"""Truncated SVD: each weight becomes the product of two narrow matrices, its best one of that rank.

Formula:
    W = U S V^T;   first = S_r^(1/2) V_r^T,   second = U_r S_r^(1/2)
    rank r = floor(keep * in * out / (in + out))
Paper: the baseline of SVD-LLM, arXiv 2403.07378. The error in the Frobenius norm is the root of the sum of
the squares of the discarded singular values, the smallest possible one (Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..core.passes import Pass
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..core.structure import Structured
from ..registry import get, register


@register("svd")
@dataclass(frozen=True)
class Svd(Pass):
    """Truncated SVD: replace each weight by two factors of low rank. Needs no data.

    Options:
        keep: Share of a weight's entries that the two factors have together at most. The rank follows from
            it, rounded down. Either this or ``rank`` is given.
        rank: Rank of every layer.
    """

    verb: ClassVar[str] = "compress"
    makes_structures: ClassVar[bool] = True

    keep: Annotated[float, Gt(0), Le(1)] | None = None
    rank: Annotated[int, Ge(1)] | None = None

    def faults(self, sites: Sequence[Site]) -> list[str]:
        """Return why the settings make no sense for these sites, one sentence for each fault."""
        if self.keep is None and self.rank is None:
            return ["How much is kept is not set. Add keep=0.8 or rank=16."]
        if self.keep is not None and self.rank is not None:
            return [
                f"keep={self.keep} has no effect with rank={self.rank}, which says how much is kept. "
                "Leave one of them out."
            ]
        found = []
        for site in sites:
            rank, most = self.rank_of(site), min(site.shape)
            size = f"{site.name}, {site.shape[0]} x {site.shape[1]}"
            if rank < 1:
                found.append(f"keep={self.keep} leaves a rank of 0 for {size}. Raise it.")
            elif rank > most:
                found.append(f"rank={self.rank} is more than the {most} that {size}, can have. Lower it.")
        return found

    def rank_of(self, site: Site) -> int:
        """Return the rank of a site's factors."""
        if self.keep is None:
            return self.rank or 0
        return int(self.keep * site.size / sum(site.shape))

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Structured:
        """Return the factors of a site's weight [out, in]."""
        low_rank = get("structure", "low_rank")
        sizes = low_rank(site.shape[1], site.shape[0], site.has_bias, self.rank_of(site))
        return Structured(sizes, sizes.fit(weight))
