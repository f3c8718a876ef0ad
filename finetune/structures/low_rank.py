"""Low rank: a linear layer whose weight is the product of two narrow matrices.

Formula:
    y = second(first(x)) + bias        first [rank, in], second [out, rank]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..core.linalg import factor_low_rank
from ..core.structure import Structure, StructuredLinear
from ..registry import register


class LowRankLinear(StructuredLinear):
    """Two linear layers, ``first`` and ``second``; the bias belongs to ``second``."""

    def __init__(self, structure: LowRank) -> None:
        super().__init__(structure)
        self.first = nn.Linear(structure.inputs, structure.rank, bias=False)
        self.second = nn.Linear(structure.rank, structure.outputs, bias=structure.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


@register("low_rank")
@dataclass(frozen=True)
class LowRank(Structure):
    """Low rank: the product of two narrow matrices."""

    BIAS: ClassVar[str] = "second.bias"

    rank: int

    def faults(self) -> list[str]:
        """Return a clause if the rank exceeds a side of the weight."""
        most = min(self.inputs, self.outputs)
        return [f"its rank {self.rank} is more than {most}"] if self.rank > most else []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the two factors, and that of the bias if there is one."""
        found: dict[str, tuple[int, ...]] = {
            "first.weight": (self.rank, self.inputs),
            "second.weight": (self.outputs, self.rank),
        }
        if self.bias:
            found[self.BIAS] = (self.outputs,)
        return found

    def build(self) -> LowRankLinear:
        """Return the module."""
        return LowRankLinear(self)

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the factors of the best approximation in the Frobenius norm (Eckart and Young, 1936)."""
        first, second = factor_low_rank(weight, self.rank)
        return {"first.weight": first.to(weight.dtype), "second.weight": second.to(weight.dtype)}

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the product of the factors, [out, in], float64."""
        product: Tensor = tensors["second.weight"].double() @ tensors["first.weight"].double()
        return product
