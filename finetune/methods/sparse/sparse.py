"""sparse: train existing entries of the weights, chosen by any combination of the sparse engine's axes.

The axes are score, direction, scope, grain and schedule. The published methods of this family are presets of
them. This one leaves all of them open, so that combinations which no paper has tried can be compared.

Formula:
    W' = W + S        S: K trained values, from 0, at positions that the axes choose

Paper: none; the axes are taken from the methods of this family.

Reading: The meaning of every axis is described with its option. Settings that contradict each other, or that
would have no effect, are refused.

Rate: None published; an engine.

Differs: There is no released code.

Cost: K trained values, their gradients and two moments in Adam. Values and positions are stored. Scores of
gradients cost backward passes at every choice, scores of a low-rank approximation one eigendecomposition per
weight.
"""

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
    """Train a share of the existing weights, chosen by any combination of the axes."""

    schedule: Schedule = Static()

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the entries that score, direction, scope, grain and schedule choose"
