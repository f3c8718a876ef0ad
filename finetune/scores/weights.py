"""Scores of the weights alone, and a random one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.linalg import low_rank
from ..core.sparse.scores import Score, ScoredSite
from ..registry import register


@register("random")
class Random(Score):
    """Uniform random numbers from the run's generator."""

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        drawn = torch.rand(site.layer.original.shape, generator=site.generator)
        return drawn.to(site.layer.original.device)


@register("magnitude")
class Magnitude(Score):
    """|w|."""

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.weight().abs_()


@register("change")
class Change(Score):
    """|w - w_0|, the movement since the start (LT-SFT, arXiv 2110.07560)."""

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.weight().sub_(site.layer.original.float()).abs_()


@register("lowrank_magnitude")
class LowRankMagnitude(Score):
    """|W_R|, where W_R is the best approximation of rank ``rank`` of the weight."""

    uses: ClassVar[tuple[str, ...]] = ("rank",)

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return low_rank(site.weight(), method.rank).abs_()


@register("principal")
class Principal(LowRankMagnitude):
    """|W_R|, as LIFT (arXiv 2506.00772) names it: its principal weights have the largest values."""

    uses: ClassVar[tuple[str, ...]] = ("rank",)


@register("off_principal")
class OffPrincipal(Score):
    """Minus the better of an entry's places in the ascending orders of |w| and |W_R|.

    The K largest scores are the union of the a smallest entries by |w| and the a smallest by |W_R|, for the a
    whose union has K entries: the "safe" mask of arXiv 2511.08567, M_low united with the complement of
    M_princ.
    """

    uses: ClassVar[tuple[str, ...]] = ("rank",)
    signed: ClassVar[bool] = True

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        w = site.weight()
        best = _places(low_rank(w, method.rank).abs_())
        return torch.minimum(best, _places(w.abs_())).neg_()


def _places(x: Tensor) -> Tensor:
    """Return the place of each entry in ascending order, ties by position, as float32 (exact up to 2**24)."""
    order = x.reshape(-1).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return place.view(x.shape).float()
