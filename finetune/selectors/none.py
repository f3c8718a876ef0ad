"""No selection: every part trains in every step."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.selector import Selector
from ..registry import register


@register("none")
@dataclass(frozen=True)
class NoSelector(Selector):
    """Train every part in every step."""
