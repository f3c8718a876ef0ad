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
    """|w - w_0|, the change since the start (LT-SFT, arXiv 2110.07560)."""

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
    """|W_R|, whose largest entries LIFT (arXiv 2506.00772) calls the principal weights."""

    uses: ClassVar[tuple[str, ...]] = ("rank",)


@register("off_principal")
class OffPrincipal(Score):
    """Minus the smaller of an entry's two ranks, in ascending order of |w| and of |W_R|.

    The entries with the K largest scores are the union of the n smallest by |w| and the n smallest by |W_R|,
    where n is chosen so that the union has K entries. This is the "safe" mask of arXiv 2511.08567, the union
    of M_low and the complement of M_princ.
    """

    uses: ClassVar[tuple[str, ...]] = ("rank",)
    signed: ClassVar[bool] = True

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        w = site.weight()
        best = _places(low_rank(w, method.rank).abs_())
        return torch.minimum(best, _places(w.abs_())).neg_()


def _places(x: Tensor) -> Tensor:
    """Return the rank of each entry in ascending order, ties by position, as float32 (exact up to 2**24)."""
    order = x.reshape(-1).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return place.view(x.shape).float()
