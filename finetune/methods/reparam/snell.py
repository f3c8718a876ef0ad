"""SNELL: sparse tuning with a kernelized low-rank change (Shen et al., 2024, arXiv 2411.01800).

The change of a weight is a signed difference of distances between the rows of small factors, thresholded at a quantile of its own magnitude. Paper
and released code differ in the sparsifier; ``sparsifier`` chooses the reading, ``t`` being the threshold and K the kernel matrix:

    released   change = K |K| where |K| > t, with |K| held constant in the gradient; at sparsity 0 the released code switches to change = K,
               without the factor |K|, so that going from 0 to the smallest positive sparsity shrinks the initial change a thousandfold
    paper      change = K max(|K| - t, 0), eq. 5, differentiated through |K|; at sparsity 0, t is 0 and nothing switches

Both hold t constant, and ``sparsity`` is the share set to zero (the code; one sentence of the paper has it as the share kept). The released code's
own further settings: ``dropout=0.1 drop_path=0.1``; its coefficients +-0.1 are fixed there (learnable in the paper) and fixed here. The class token
is trained too, in place, where a model has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.kernel import Kernel, Kernelized
from ...core.site import Site
from ...registry import register


@register("snell")
@dataclass(frozen=True)
class SNELL(Kernelized):
    """SNELL: a thresholded difference of distances between small factors."""

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = "two factors a layer; their kernel, thresholded, changes the weight"
    paper: ClassVar[str] = "arXiv 2411.01800"
    neutral_start: ClassVar[bool] = False

    @property
    def plain(self) -> bool:
        """The released code's switch at sparsity 0: the change is K itself."""
        return self.sparsifier == "released" and self.sparsity == 0

    def delta(self, site: Site) -> Kernel:
        return Kernel(site.shape, self)
