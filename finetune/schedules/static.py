"""The static schedule: entries are chosen once, before the first step.

Formula:
    trained at every step: K entries, those of step 0
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.sparse.schedule import Schedule
from ..registry import register


@register("static")
@dataclass(frozen=True)
class Static(Schedule):
    """Choose the entries once, before the first step."""
