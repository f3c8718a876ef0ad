"""Each check of a structure finds the fault that it is there for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

from finetune import registry
from finetune.core.structure import Structure, StructuredLinear
from finetune.models import sidecar
from finetune.structures.low_rank import LowRank, LowRankLinear
from finetune.testing.structures import STRUCTURE_CHECKS, StructureTrial


@dataclass(frozen=True)
class LiesAboutShapes(LowRank):
    """Names one row more than the module has."""

    name: ClassVar[str] = "faulty"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "first.weight": (self.rank + 1, self.inputs)}


@dataclass(frozen=True)
class HasAPath(LowRank):
    """Has a text among its sizes."""

    name: ClassVar[str] = "faulty"

    path: str = "weights.bin"


@dataclass(frozen=True)
class WrongDense(LowRank):
    """Multiplies out to another weight than it computes with."""

    name: ClassVar[str] = "faulty"

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return 2 * super().dense(tensors)


@dataclass(frozen=True)
class FitsInPlace(LowRank):
    """Overwrites the weight that it fits."""

    name: ClassVar[str] = "faulty"

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        found = super().fit(weight)
        weight.zero_()
        return found


BUILT = count(1)


class Numbered(LowRankLinear):
    def __init__(self, structure: LowRank) -> None:
        super().__init__(structure)
        self.number = next(BUILT)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.number


@dataclass(frozen=True)
class Numbers(LowRank):
    """Computes with a number that no folder holds."""

    name: ClassVar[str] = "faulty"

    def build(self) -> LowRankLinear:
        return Numbered(self)


@dataclass(frozen=True)
class HasAFreeSize(LowRank):
    """Has a size that nothing bounds."""

    name: ClassVar[str] = "faulty"

    group: int = 1


@dataclass(frozen=True)
class RaisesForOddSizes(LowRank):
    """Fails with another error than a fault for sizes that do not fit each other."""

    name: ClassVar[str] = "faulty"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        assert self.rank < 4
        return super().shapes()


@pytest.fixture
def registered() -> Iterator[None]:
    """Register a faulty class, as a plug-in would."""
    yield
    if "faulty" in registry.catalog("structure"):
        registry.remove("structure", "faulty")


def trial_of(cls: type[LowRank], folder: Path) -> StructureTrial:
    if cls is not LowRank:
        registry.add("structure", registry.Entry("faulty", __name__, "", {"class": cls.__name__}))
    return StructureTrial(partial(cls, rank=3), "llama", folder)


@pytest.mark.parametrize(
    ("check", "cls"),
    [
        ("sizes", LiesAboutShapes),
        ("sizes", HasAPath),
        ("function", WrongDense),
        ("function", FitsInPlace),
        ("read back", Numbers),
        ("hostile", HasAFreeSize),
        ("hostile", RaisesForOddSizes),
    ],
)
def test_a_fault_of_a_structure_is_found(
    check: str, cls: type[LowRank], tmp_path: Path, registered: None
) -> None:
    with pytest.raises(AssertionError):
        STRUCTURE_CHECKS[check](trial_of(cls, tmp_path))


def read_leniently(entry: Mapping[str, Any]) -> Structure:
    """Turn whatever can be a number into one, and ignore what is not known."""
    sizes = {key: int(entry[key]) for key in ("inputs", "outputs", "rank")}
    return LowRank(bias=bool(entry["bias"]), **sizes)


@pytest.mark.parametrize(
    ("check", "function", "broken"),
    [
        ("hostile", "_read_structure", read_leniently),
        ("read back", "write_entries", lambda structures, folder: None),
    ],
)
def test_a_fault_of_the_reader_is_found(
    check: str, function: str, broken: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trial_of(LowRank, tmp_path)
    monkeypatch.setattr(sidecar, function, broken)
    with pytest.raises((AssertionError, FileNotFoundError)):
        STRUCTURE_CHECKS[check](trial)


def test_modules_know_their_structure() -> None:
    structure = LowRank(4, 6, False, 2)
    assert isinstance(structure.build(), StructuredLinear)
    assert structure.build().structure == structure
