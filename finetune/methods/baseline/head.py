"""Linear probe: train only the task head, on the features of the frozen model.

Every method trains the head of a classification task; this one trains nothing else.

Formula:
    logits = W h + b        W, b: the head, trained; h: features of the frozen model

Paper: none; a baseline.

Reading: There is no setting.

Rate: None published; a baseline.

Differs: There is no released code.

Cost: The parameters of the head, their gradients and two moments in Adam. Only the head is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.method import Method
from ...registry import register


@register("head")
@dataclass(frozen=True)
class Head(Method):
    """Linear probe: only the task head."""

    family: ClassVar[str] = "baseline"
    trains: ClassVar[str] = "only the head, which every method trains for classification"

    def build(self, model: nn.Module) -> nn.Module:
        return nn.Module()
