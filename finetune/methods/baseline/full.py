"""Full fine-tuning: train every parameter in place.

The model's own tensors are trained, in float32 or wider, without a copy of the base in memory. The originals
are read again from the model's file where the base is needed.

Formula:
    W is trained, from its pretrained value

Paper: none; a baseline.

Reading: Every parameter that the task head does not already train is trained; frozen buffers stay. There is
no setting.

Rate: None published; a baseline.

Differs: There is no released code.

Cost: One trained value per parameter, its gradient and two moments in Adam: in float32, 16 bytes per
parameter. The whole model is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.inplace import InPlace, list_untrained
from ...core.method import Method
from ...registry import register


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: all parameters."""

    family: ClassVar[str] = "dense"
    trains: ClassVar[str] = "every parameter, in place"

    def build(self, model: nn.Module) -> InPlace:
        return InPlace(model, list_untrained(model), keep=False)
