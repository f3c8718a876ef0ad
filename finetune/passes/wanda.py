"""Wanda: the entries whose absolute value times the norm of their input is smallest become 0.

Formula:
    score_ij = |W_ij| * ||X_j||        X_j: input j over all tokens of the calibration data
Paper: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695.
Blocks are pruned from the first to the last, and the inputs of a block come from the pruned blocks before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..core.passes import Pruned
from ..core.pruning import Pruning, Scope
from ..core.site import Site
from ..core.statistics import SiteStatistics, StatisticName
from ..registry import register


@register("wanda")
@dataclass(frozen=True)
class Wanda(Pruning):
    """Wanda: zero the entries with the smallest |weight| times input norm in each row.

    Options:
        inputs: Whether the inputs of a block come from the ``processed`` blocks before it, or from those of
            the ``original`` model.
    """

    needs: ClassVar[tuple[StatisticName, ...]] = ("input_squares",)
    paper_scope: ClassVar[Scope] = "row"

    inputs: Literal["processed", "original"] = "processed"

    def is_sequential(self) -> bool:
        """Tell whether a block's statistics are gathered after the blocks before it have been changed."""
        return self.inputs == "processed"

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Pruned:
        """Return the pruned weight, [out, in]."""
        assert statistics is not None
        norms = statistics["input_squares"].sqrt().to(weight.device)
        return self.prune(weight, weight.float().abs() * norms)
