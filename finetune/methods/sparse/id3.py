"""ID3: entries are unmasked step by step by |g| / (|w| + eps)^power (Agarwal et al., 2025, arXiv 2408.14470).

K entries over the whole model, in equal parts over the steps (after part i of n: i K / n, rounded); chosen ones stay. Each part comes from the
gradient of its own step's batch, seen in one more backward pass before the step; ``schedule.every`` thins these out. Ties go to the lower position,
so that no step exceeds its part, which the released code does. Adam's moments of an entry are 0 until it is chosen and its first updates use the
global bias correction, as released; weight decay pulls towards the pretrained weights, so that unchosen entries stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import Scope, ScoreName
from ...registry import register
from ...schedules.grow import Grow


@register("id3")
@dataclass(frozen=True)
class ID3(Sparse):
    """ID3: a few more entries at every step, those with large gradient and small weight."""

    score: ScoreName = "d3"
    scope: Scope = "model"
    schedule: Schedule = Grow()

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "entries with large gradient and small weight, more at every step"
    paper: ClassVar[str] = "arXiv 2408.14470"
