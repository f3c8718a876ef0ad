"""The choice of step 0 stays."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.sparse.schedule import Schedule
from ..registry import register


@register("static")
@dataclass(frozen=True)
class Static(Schedule):
    """Chosen once, before the first step."""
