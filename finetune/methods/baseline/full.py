"""Full fine-tuning: every parameter is trained where it is, with no copy of the base in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.inplace import InPlace, untrained
from ...core.method import Method
from ...registry import register


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: all parameters."""

    family: ClassVar[str] = "dense"
    trains: ClassVar[str] = "every parameter, in place"

    def build(self, model: nn.Module) -> InPlace:
        return InPlace(model, untrained(model), keep=False)
