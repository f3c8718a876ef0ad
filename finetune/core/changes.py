"""The forms that a trained change can take, for the code that exports, composes, merges or inspects it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class SparseChange:
    """Single entries of a weight [out, in]: ``values`` [n] float32 are added at the flat positions ``index``.

    ``index`` [n] int64 is ascending without repetition.
    """

    index: Tensor
    values: Tensor


@dataclass(frozen=True)
class LowRankChange:
    """``scale * b @ a``, with ``a`` [rank, in] and ``b`` [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Changes:
    """What one part changes, without its gate. If all fields are empty, only the dense matrix is known."""

    entries: SparseChange | None = None
    factors: LowRankChange | None = None
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)  # trained in place, by name


@dataclass(frozen=True, eq=False)
class Unit:
    """Trained values that are frozen and trained together, and the place in the model that they belong to."""

    name: str
    place: str | None  # dotted name of the layer or parameter; None: tied to no single place
    parameter: nn.Parameter

    @property
    def span(self) -> slice | None:
        """Return the slice of ``parameter`` that belongs to the unit; None: all of it."""
        return None

    @property
    def values(self) -> Tensor:
        """Return the trained values, without gradient."""
        values = self.parameter.detach()
        return values if self.span is None else values[self.span]

    def set_frozen(self, frozen: bool) -> None:
        """Freeze these values, or train them again."""
        self.parameter.requires_grad_(not frozen)
