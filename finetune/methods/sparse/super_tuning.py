"""Super-Tuning: train the largest entries of each weight, chosen once before training.

K entries of each matrix are trained, those with the largest magnitude; ties go to the lower position. The
variant Supra adds a low-rank branch beside the entries: ``branch`` is its rank, and 0 means no branch.

Formula:
    W' = W + S                 S: trained values at the K largest |w|, from 0
    Supra: W' = W + S + 2 B A  A: [branch, in] as in LoRA, B: [out, branch] from 0

Paper: arXiv 2607.09287, as cited in huggingface/peft.

Reading: The code and the documentation of huggingface/peft were read, not the paper. sparsity = 0.99 is
peft's default, and ``direction=smallest`` is its ``select_top=False``. The scale of the branch is alpha /
rank with peft's default alpha = 2 rank.

Rate: The rate of the paper is unverified.

Differs:
- peft truncates size (1 - sparsity) in floating point, which gives 99 instead of 100 for size 1000 and
  sparsity 0.9; here the number of untrained entries is rounded.
- peft can leave the positions out of its file and choose them again from the base weights; here they are
  always stored.

Cost: K trained values, their gradients and two moments in Adam; a branch adds ``branch`` (in + out)
of each per layer. Values, positions and factors are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Lt
from torch import nn

from ...core.attach import attach
from ...core.lowrank import LowRank
from ...core.site import find_sites
from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import ScoreName
from ...registry import register
from ...schedules.static import Static


@register("super_tuning")
@dataclass(frozen=True)
class SuperTuning(Sparse):
    """Super-Tuning: the largest entries of each weight, fixed.

    Options:
        branch: Rank of the low-rank branch beside the entries; 0 means no branch.
    """

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.99
    score: ScoreName = "magnitude"
    schedule: Schedule = Static()
    branch: Annotated[int, Ge(0)] = 0

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the largest entries of each weight, chosen once"
    paper: ClassVar[str] = "arXiv 2607.09287"

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = super().build(model)
        if self.branch:
            branch = nn.ModuleDict()
            for site in find_sites(model, self.targets):
                delta = branch[site.key] = LowRank(site.shape, self.branch, 2.0 * self.branch, 0.0)
                attach(model, site.name, delta)
            state["branch"] = branch
        return state
