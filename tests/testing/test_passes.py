"""Each check of a pass finds the fault that it is there for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from finetune.artifacts import pass_subject, passes
from finetune.core.passes import Pass
from finetune.core.site import Site
from finetune.core.statistics import SiteStatistics
from finetune.passes.linear import Linear
from finetune.testing.passes import PASS_CHECKS, PassTrial, check_pass


@dataclass(frozen=True)
class Faultless(Pass):
    """Rounds weights to eighths."""

    name: ClassVar[str] = "faultless"
    verb: ClassVar[str] = "prune"
    idempotent: ClassVar[bool] = True

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Tensor:
        return (weight * 8).round() / 8


@dataclass(frozen=True)
class ChangesInPlace(Faultless):
    """Overwrites the weight that it was given."""

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Tensor:
        return weight.zero_()


@dataclass(frozen=True)
class ChangesItsModels(Linear):
    """Overwrites the changes of the further models, which gives the same at every call."""

    def combine(self, site: Site, weight: Tensor, changes: Sequence[Tensor | None]) -> Tensor:
        for change in changes:
            assert change is not None
            change.zero_()
        return weight


@dataclass(frozen=True)
class Halves(Faultless):
    """Says that a second run changes nothing, and halves again."""

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Tensor:
        return weight / 2


CALLS = [0]


@dataclass(frozen=True)
class Counts(Faultless):
    """Depends on how often it was called, which no journal holds."""

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Tensor:
        CALLS[0] += 1
        return weight + CALLS[0]


def test_a_pass_without_fault_passes() -> None:
    check_pass(Faultless(), "gpt2")


@pytest.mark.parametrize(
    ("check", "make"),
    [
        ("pure", ChangesInPlace),
        ("pure", ChangesItsModels),
        ("pure", Halves),
        ("pure", Counts),
        ("restart", Counts),
    ],
)
def test_a_fault_of_a_pass_is_found(check: str, make: Callable[[], Pass], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        PASS_CHECKS[check](PassTrial(make(), "llama", tmp_path))


NEVER_DONE = {"tensor": "", "sha256": "", "seconds": 0, "entries": 1, "zeros": 0}  # a row of the journal


@pytest.mark.parametrize(
    ("check", "module", "function", "broken"),
    [
        ("streamed", pass_subject, "turned", lambda weight, site: weight),
        ("restart", passes, "_read_journal", lambda file: [NEVER_DONE] * 3),
        ("proof", passes, "prove", lambda subject, copy, rows: None),
    ],
)
def test_a_fault_of_the_driver_is_found(
    check: str,
    module: ModuleType,
    function: str,
    broken: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights of GPT-2 are stored transposed; ``Uneven`` tells rows from columns."""
    monkeypatch.setattr(module, function, broken)
    with pytest.raises(AssertionError):
        PASS_CHECKS[check](PassTrial(Uneven(), "gpt2", tmp_path))


@dataclass(frozen=True)
class Uneven(Faultless):
    """Changes the first row alone."""

    def tensor(self, site: Site, weight: Tensor, statistics: SiteStatistics | None) -> Tensor:
        return torch.cat([weight[:1] * 0, weight[1:]])
