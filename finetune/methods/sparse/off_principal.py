"""Off-principal masks: train entries off the principal part of each weight, chosen once.

The pretrained weights decide which entries these are. There are four masks of K entries per matrix, each a
choice of score and direction. The default is the "safe" mask, the union of the other two masks that avoid the
principal part.

Formula:
    W_R: best approximation of W of rank ``rank``
    safe        score=off_principal, the default: union of ``low`` and ``complement``, both of the same
                size, chosen so that the union has K entries
    complement  score=principal direction=smallest: the K smallest |W_R|
    low         score=magnitude direction=smallest: the K smallest |w|
    principal   score=principal: the K largest |W_R|

Paper: "The Path Not Taken: RLVR Provably Learns Off the Principals", 2025, arXiv 2511.08567; the masks are
those of its case study.

Reading: The paper was read. It does not state the rank, how a mask is applied, or what becomes of biases and
norms; here the entries of the mask are trained and nothing else. The masks of its case study have half of the
entries, which is the default. Weight decay pulls towards the pretrained weights, since any other decay would
move entries outside of the mask. ``finetune inspect`` (the analysis ``geometry``) makes the paper's
measurements of a run, and ``finetune analyze what=interventions`` its interventions on the pretrained
weights.

Rate: The paper trains with reinforcement learning at 1e-6, constant.

Differs: The authors released no code. In the paper the safe mask is the union of two masks of fixed shares,
so its size follows from the weights; here its size is K.

Cost: K trained values, their gradients and two moments in Adam. Values and positions are stored. One
eigendecomposition of the smaller Gram matrix of each weight, in float64, before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Lt

from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import ScoreName
from ...registry import register
from ...schedules.static import Static


@register("off_principal")
@dataclass(frozen=True)
class OffPrincipal(Sparse):
    """Off-principal masks: a fixed mask off the principal part of each weight."""

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5
    score: ScoreName = "off_principal"
    schedule: Schedule = Static()

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "entries off the principal part of each weight, chosen once"
    paper: ClassVar[str] = "arXiv 2511.08567"
