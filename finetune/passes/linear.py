"""Linear folding: a weighted sum of what several models change of one base.

Formula:
    W' = W + sum_i w_i (W_i - W)        W: the base, W_i: model i, by default w_i = 1/n
With the default weights W' is the mean of the models. Weights need not sum to 1.
Papers: for the mean, Wortsman et al., "Model soups", arXiv 2203.05482; for sums of changes, Ilharco et al.,
"Editing Models with Task Arithmetic", arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.passes import Pass
from ..core.site import Site
from ..registry import register


@register("linear")
@dataclass(frozen=True)
class Linear(Pass):
    """Linear folding: add the weighted changes of several runs or models of one base.

    Options:
        weights: The factor of each model's change, in the order of ``runs``; none stands for 1/n each.
    """

    verb: ClassVar[str] = "fold"
    models: ClassVar[Literal["one", "several"]] = "several"

    weights: tuple[float, ...] = ()

    def count_faults(self, models: int) -> list[str]:
        """Return a fault if there is not one weight for each model."""
        if not self.weights or len(self.weights) == models:
            return []
        given = ",".join(f"{weight:g}" for weight in self.weights)
        return [
            f"weights={given}: the number of weights is {len(self.weights)}, and that of runs {models}. "
            "Give one for each, or none for the mean."
        ]

    def combine(self, site: Site, weight: Tensor, changes: Sequence[Tensor | None]) -> Tensor:
        """Return the base's weight plus the weighted changes, [out, in], float64."""
        total = torch.zeros_like(weight)
        for factor, change in zip(self.weights or [1 / len(changes)] * len(changes), changes, strict=True):
            if factor and change is not None:
                total += factor * change
        return weight + total
