"""Fixed masks from the pretrained weights, off their principal part (arXiv 2511.08567: "RLVR learns off the principals", its case study).

Four masks of K entries each, as score and direction; W_R is the best approximation of rank ``rank``, which the paper does not state:

    safe        score=off_principal, the default: low united with complement, both with the share for which the union has K entries
    complement  score=principal direction=smallest: the K smallest by |W_R|
    low         score=magnitude direction=smallest: the K smallest by |w|
    principal   score=principal: the K largest by |W_R|

How the paper applies a mask and what it does with biases and norms is not stated; here the entries are trained and nothing else. Weight decay pulls
towards the pretrained weights, since any other would move entries outside the mask.
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
