"""SNELL: sparse tuning with a kernelized low-rank change.

The change of a weight is not a product of two small factors but a signed difference of distances between
their rows, so its rank is far above ``rank``. In every forward pass it is thresholded at a quantile of its
own magnitude. No mask is stored: the entries are chosen again in every step. The factors do not start at 0,
so the output at step 0 is close to that of the base model but not equal to it. The class token, if the model
has one, is trained too, in place and without weight decay.

Formula:
    K[j, i] = scale (|rows[0, j] - cols[0, i]| - |rows[1, j] - cols[1, i]|)
    rows: [2, out, rank / 2], cols: [2, in, rank / 2], distances are Euclidean
    t: the ``sparsity`` quantile of |K|, held constant in the gradient
    sparsifier=released:  change = K |K| where |K| > t, else 0; the factor |K| is constant in the gradient
    sparsifier=paper:     change = K max(|K| - t, 0), differentiated through |K|     (eq. 5)

Paper: Shen et al., "Expanding Sparse Tuning for Low Memory Usage", NeurIPS 2024, arXiv 2411.01800.

Reading: Paper and released code were read. They differ in the sparsifier, which ``sparsifier`` chooses; the
default is that of the code. ``sparsity`` is the share set to zero, as in the code; one sentence of the paper
calls it the share that is kept. rank = 32 and scale = 0.1 are those of the released scripts, which choose
``sparsity`` for every task; 0.9 is one of their values. The released scripts also use dropout=0.1 and
drop_path=0.1.

Rate: The paper has 1e-3 over 100 epochs; the released scripts have the same, but 3e-4 to 7e-4 for three of
their tasks.

Differs:
- The coefficients +-0.1 are fixed in the code and here; the paper calls them trained.
- At sparsity 0 the released code switches to change = K, without the factor |K|, so that the smallest
  positive sparsity shrinks the initial change a thousandfold. ``sparsifier=released`` does the same; with
  ``paper``, t is 0 and there is no such switch.
- With dropout the released code does not drop the input of the projection after attention, and q, k and v
  share one dropout mask. Here every layer drops its own input.

Cost: rank (in + out) trained values per layer, their gradients and two moments in Adam. The factors are
stored. K is formed in blocks in every forward pass and again in backward. Its threshold is found without a
sort.
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
    trains: ClassVar[str] = "two factors per layer; their kernel, thresholded, changes the weight"
    paper: ClassVar[str] = "arXiv 2411.01800"
    neutral_start: ClassVar[bool] = False

    @property
    def plain(self) -> bool:
        """Tell whether the change is K itself: the switch of the released code at sparsity 0."""
        return self.sparsifier == "released" and self.sparsity == 0

    def delta(self, site: Site) -> Kernel:
        return Kernel(site.shape, self)
