"""LIFT: train the principal weights, the largest after rank reduction (Liu et al., 2025, arXiv 2506.00772).

Every ``schedule.every`` steps they are chosen anew from the weights as they are then; entries that stay keep their moments, new ones start at 0, and
those that leave keep the value they reached, so that the stored change covers the union over all refreshes. The released code's default mask type
lacks the word "largest" and so trains the smallest; here the paper's reading is the default, and ``direction=smallest`` is theirs. ``rank`` is the
rank of the approximation (their filter rank); the budget is ``sparsity``, in the paper about 0.95. Structured LIFT: ``grain=block:4``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import ScoreName
from ...registry import register
from ...schedules.redraw import Redraw


@register("lift")
@dataclass(frozen=True)
class LIFT(Sparse):
    """LIFT: the principal weights, refreshed from time to time."""

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.95
    score: ScoreName = "lowrank_magnitude"
    schedule: Schedule = Redraw(every=50)
    decay: Literal["base", "zero"] = "zero"

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = (
        "the entries that are largest after rank reduction, chosen again from time to time"
    )
    paper: ClassVar[str] = "arXiv 2506.00772"
