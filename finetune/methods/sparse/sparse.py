"""Any crossing of the sparse engine's axes: score, direction, scope, grain and schedule, whether a paper tried it or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...registry import register
from ...schedules.static import Static


@register("sparse")
@dataclass(frozen=True)
class Crossing(Sparse):
    """Train a share of the existing weights; which and when is yours to cross."""

    schedule: Schedule = Static()

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the entries that score, direction, scope, grain and schedule say"
