"""SHiRA: train a few entries of each weight, chosen once (Bhardwaj et al., 2024, arXiv 2406.13175).

The paper's masks are choices of score and grain: random (the default, as in peft), ``score=magnitude`` (WM), ``score=gradient``, ``score=snip``,
and ``grain=row`` or ``column`` with ``score=random`` (Struct, without its diagonal). The vector form: K values from 0 added to W at fixed places, so
weight decay pulls towards W. peft's random mask starts from the same generator state in every run and layer; here the run's seed draws it, and every
layer gets its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...registry import register
from ...schedules.static import Static


@register("shira")
@dataclass(frozen=True)
class SHiRA(Sparse):
    """SHiRA: a fixed set of entries of each weight."""

    schedule: Schedule = Static()

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "a share of the entries of each weight, chosen once"
    paper: ClassVar[str] = "arXiv 2406.13175"
