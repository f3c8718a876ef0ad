"""LIFT: train the principal weights, which are the largest after rank reduction.

Every ``schedule.every`` steps the entries of each matrix are chosen again, from the weights as they are then.
Entries that stay keep their moments in Adam, new entries start with moments of 0, and entries that are
dropped keep the value they have reached. The stored change therefore covers the union of all choices and is
larger than the budget.

Formula:
    W_R: best approximation of W of rank ``rank``
    trained: the K entries of each matrix with the largest |W_R|

Paper: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
Reasoning-Focused Supervised Fine-Tuning", ICML 2025, arXiv 2506.00772.

Reading: Most of the paper's text and the released code were read. The paper's reading, the *largest* entries,
is the default; ``direction=smallest`` trains what the released code trains. sparsity = 0.95 is about the
paper's usual budget. The period of 50 steps is the shortest of a range in which the paper finds little
difference. The paper finds that the best rank is close to that of a LoRA with as many parameters as the
budget has; 64 is one of its values. Weight decay pulls towards 0, as AdamW's does on the weights. The paper's
structured variant is ``grain=block:4``.

Rate: The paper has 1e-4 or 2e-4, linear, depending on model and task; the released scripts have 5e-5 to 2e-4.

Differs:
- The released code's default mask type lacks the word "largest", so it trains the *smallest* entries of
  |W_R|.
- The released budget is the size of a low-rank change: rank (in + out) entries per matrix. Here it is
  ``sparsity``.
- In the released code the refresh is one step earlier, Adam adds eps before the bias correction, and weight
  decay acts on a copy and has no effect.
- The released code keeps moments and values in the type of the weights, often bfloat16; here they are
  float32.

Cost: K trained values, their gradients and two moments in Adam. The union of all choices is stored. At every
refresh one eigendecomposition of the smaller Gram matrix of each weight, in float64.
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
