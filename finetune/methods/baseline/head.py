"""Linear probe: the task head alone is trained, on the frozen model's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.method import Method
from ...registry import register


@register("head")
@dataclass(frozen=True)
class Head(Method):
    """Linear probe: the task head alone."""

    family: ClassVar[str] = "baseline"
    trains: ClassVar[str] = "only the head, which every method trains for classification"

    def build(self, model: nn.Module) -> nn.Module:
        return nn.Module()
