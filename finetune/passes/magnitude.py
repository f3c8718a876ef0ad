"""Magnitude pruning: the entries with the smallest absolute values become 0.

Formula:
    score = |W|
Paper: the baseline of Wanda, arXiv 2306.11695. Its released code prunes one entry more than the sparsity
asks for, and all entries equal to the last one; here the number of zeros is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.passes import Pruned
from ..core.pruning import Pruning
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..registry import register


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(Pruning):
    """Magnitude pruning: zero the smallest weights of each matrix. Needs no data."""

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Pruned:
        """Return the pruned weight, [out, in]."""
        return self.prune(weight, weight.float().abs())
