"""The scores that trained entries are chosen by: one axis of the sparse engine.

A score is a class with ``@register("name")``, here or in the file of the method that brings it. It is called
with one site at a time and with the method, whose settings it may read, and returns a float32 number for each
entry of the site's weight; the engine trains the entries with the largest scores (or the smallest, with
``direction=smallest``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ... import registry
from ...registry import register
from ..linalg import low_rank
from ..part import Patched

Needs = Literal["weight", "gradient", "squares", "batch squares"]
ScoreName = Annotated[str, registry.Named("score")]


@dataclass(frozen=True)
class ScoredSite:
    """One site as a score sees it.

    ``grad`` [out, in]: what the score ``needs`` of the gradients. ``trained`` [out, in]: the weight at the
    end of a dense phase, where there was one.
    """

    layer: Patched
    generator: torch.Generator
    grad: Tensor | None = None
    trained: Tensor | None = None

    def weight(self) -> Tensor:
        """Return a new float32 copy of the weight as it is now, [out, in]."""
        if self.trained is None:
            return self.layer.weight.float()
        return self.trained.to(torch.float32, copy=True)

    def gradient(self) -> Tensor:
        """Return ``grad``, which the score may overwrite."""
        assert self.grad is not None
        return self.grad


class Score:
    """Base of all scores.

    ``needs``: the weight alone, the ``gradient`` summed over batches, the sum of the squared gradients of
    single examples (``squares``), or of those of whole batches (``batch squares``). ``uses``: which of the
    method's settings ``batches``, ``rank``, ``power`` and ``eps`` the score reads; the engine refuses a value
    for the others. ``signed``: a score may be negative, so that no budget can be divided in proportion to its
    mean.
    """

    KIND: ClassVar[str] = "score"
    name: ClassVar[str]
    needs: ClassVar[Needs] = "weight"
    uses: ClassVar[tuple[str, ...]] = ()
    signed: ClassVar[bool] = False

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        """Return the score of every entry, [out, in]."""
        raise NotImplementedError


def score_named(name: str) -> Score:
    """Return the registered score ``name``; raises ``ConfigError`` naming the known ones."""
    score: Score = registry.get("score", name)()
    return score


def settings_used() -> dict[str, tuple[str, ...]]:
    """Return, for each registered score, which optional settings of the method it uses."""
    return {name: entry.facts.get("uses", ()) for name, entry in registry.catalog("score").items()}


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


@register("gradient")
class Gradient(Score):
    """|g|."""

    needs: ClassVar[Needs] = "gradient"
    uses: ClassVar[tuple[str, ...]] = ("batches",)

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.gradient().abs_()


@register("gradient_weight")
class GradientWeight(Score):
    """g w, with its sign: to first order, minus the increase of the loss when w is set to 0."""

    needs: ClassVar[Needs] = "gradient"
    uses: ClassVar[tuple[str, ...]] = ("batches",)
    signed: ClassVar[bool] = True

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.gradient().mul_(site.weight())


@register("snip")
class Snip(Score):
    """|g w| (Lee et al., 2019, arXiv 1810.02340)."""

    needs: ClassVar[Needs] = "gradient"
    uses: ClassVar[tuple[str, ...]] = ("batches",)

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.gradient().mul_(site.weight()).abs_()


@register("fisher")
class Fisher(Score):
    """The sum of the squared gradients of single examples: the empirical Fisher information."""

    needs: ClassVar[Needs] = "squares"
    uses: ClassVar[tuple[str, ...]] = ("batches",)

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.gradient()


@register("sensitivity")
class Sensitivity(Score):
    """The sum of the squared gradients of whole batches (SPT, arXiv 2303.08566)."""

    needs: ClassVar[Needs] = "batch squares"
    uses: ClassVar[tuple[str, ...]] = ("batches",)

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.gradient()


@register("d3")
class D3(Score):
    """|g| / (|w| + eps)^power (ID3, arXiv 2408.14470)."""

    needs: ClassVar[Needs] = "gradient"
    uses: ClassVar[tuple[str, ...]] = ("batches", "power", "eps")

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.gradient().abs_().div_(site.weight().abs_().add_(method.eps).pow_(method.power))


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
