"""Super-Tuning: train the largest weights, fixed (arXiv 2607.09287, as cited in huggingface/peft, whose code and documentation were read).

The count is the size minus the share ``sparsity`` of it, rounded; peft truncates size * (1 - sparsity) in floating point, which loses an entry for
1000 and 0.9. ``direction=smallest`` is peft's ``select_top=False``. Ties go to the lower position. Its variant Supra adds a low-rank branch beside
the entries: ``branch`` is the rank of it, 0 for none; A as in LoRA, B zeros, the scale alpha / rank with alpha = 2 rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Lt
from torch import nn

from ...core.lowrank import LowRank
from ...core.part import attach
from ...core.site import find_sites
from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import ScoreName
from ...registry import register
from ...schedules.static import Static


@register("super_tuning")
@dataclass(frozen=True)
class SuperTuning(Sparse):
    """Super-Tuning: the largest entries of each weight, fixed."""

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
