"""Each check of an objective finds the fault that it is there for."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from finetune.core.distillation import Distillation
from finetune.core.objective import Objective
from finetune.core.run import Run, Seen
from finetune.errors import RunFailed
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.testing import contract, objectives


@dataclass(frozen=True)
class Faultless(Distillation):
    """Distillation without a fault."""

    name: ClassVar[str] = "faultless"


@dataclass(frozen=True)
class MeansOfMicroBatches(Faultless):
    """Averages each micro-batch by itself."""

    def counts(self, run: Run, batch: Any) -> dict[str, float]:
        return dict.fromkeys(super().counts(run, batch), 1)

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        counts = super().counts(run, batch)
        return {name: term / counts[name] for name, term in super().terms(run, seen, batch).items()}


@dataclass(frozen=True)
class DeniesThatItIsExact(Faultless):
    """Adds up, and says that it does not."""

    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class AsksTwice(Faultless):
    """Runs the teacher twice a step."""

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        run.reference(self.teacher)(batch)
        return super().terms(run, seen, batch)


@dataclass(frozen=True)
class Counts(Faultless):
    """Weighs by the number of calls, which no checkpoint holds."""

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        calls = getattr(self, "calls", 0) + 1
        object.__setattr__(self, "calls", calls)
        return {name: term * calls for name, term in super().terms(run, seen, batch).items()}


@dataclass(frozen=True)
class Unseeded(Faultless):
    """Draws from the system before the second step."""

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        factor = 1 + 1e-3 * random.Random(os.urandom(8)).random()
        return {name: term * factor for name, term in super().terms(run, seen, batch).items()}


@dataclass(frozen=True)
class TrainsTheTeacher(Faultless):
    """Changes the frozen model."""

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            next(p for p in run.model.parameters() if not p.requires_grad).add_(1e-3)
        return super().terms(run, seen, batch)


@dataclass(frozen=True)
class OverflowsInBfloat16(Faultless):
    """Gives NaN under autocast."""

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        factor = float("nan") if torch.is_autocast_enabled("cpu") else 1.0
        return {name: term * factor for name, term in super().terms(run, seen, batch).items()}


FAULTS: list[tuple[str, type[Objective]]] = [
    ("terms", MeansOfMicroBatches),
    ("terms", DeniesThatItIsExact),
    ("passes", AsksTwice),
    ("resume", Counts),
    ("same_seed", Unseeded),
    ("base_untouched", TrainsTheTeacher),
    ("bf16", OverflowsInBfloat16),
]


def fails(name: str, objective: Objective) -> bool:
    trial = contract.Trial(lambda: LoRA(rank=2), objective=objective)
    try:
        objectives.CHECKS[name](trial)
    except (AssertionError, RunFailed):
        return True
    return False


def test_an_objective_without_a_fault_passes() -> None:
    objectives.check_objective(Faultless(), Full)


@pytest.mark.parametrize(("check", "objective"), FAULTS, ids=[kind.__name__ for _, kind in FAULTS])
def test_a_fault_fails_its_check(check: str, objective: type[Objective]) -> None:
    assert fails(check, objective())


def test_every_check_has_a_planted_fault() -> None:
    assert {check for check, _ in FAULTS} == objectives.CHECKS.keys()
