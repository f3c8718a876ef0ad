"""Scores of gradients, which cost additional backward passes before entries are chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..core.sparse.scores import Needs, Score, ScoredSite
from ..registry import register


@register("gradient")
class Gradient(Score):
    """|g|."""

    needs: ClassVar[Needs] = "gradient"
    uses: ClassVar[tuple[str, ...]] = ("batches",)

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        return site.gradient().abs_()


@register("gradient_weight")
class GradientWeight(Score):
    """g w, with its sign: to first order, how much the loss falls when w is set to 0."""

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
