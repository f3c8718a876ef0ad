"""Each check of an optimizer finds the fault that it is there for."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from finetune.core.optimizer import Optimizer
from finetune.core.run import Run
from finetune.errors import RunFailed
from finetune.methods.reparam.lora import LoRA
from finetune.testing import contract, optimizers


@dataclass(frozen=True)
class Faultless(Optimizer):
    """Gradient descent with momentum."""

    lr: float = 0.1
    name: ClassVar[str] = "faultless"

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)

    def trained(self, run: Run) -> list[nn.Parameter]:
        """Return the parameters of the optimizer that have a gradient."""
        found = []
        for group in run.optimizer.param_groups:
            found += [p for p in group["params"] if p.grad is not None]
        return found


@dataclass(frozen=True)
class SkipsVectors(Faultless):
    """Moves only matrices."""

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        for parameter in self.trained(run):
            if parameter.ndim == 1:
                parameter.grad = None
        super().step(run, evaluate)


@dataclass(frozen=True)
class Counts(Faultless):
    """Weighs by the number of calls, which no checkpoint holds."""

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        calls = getattr(self, "calls", 0) + 1
        object.__setattr__(self, "calls", calls)
        for parameter in self.trained(run):
            parameter.grad = parameter.grad * calls
        super().step(run, evaluate)


@dataclass(frozen=True)
class Unseeded(Faultless):
    """Draws from the system."""

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        super().step(run, evaluate)
        with torch.no_grad():
            self.trained(run)[0].add_(1e-3 * random.Random(os.urandom(8)).random())


@dataclass(frozen=True)
class TrainsTheBase(Faultless):
    """Moves a frozen parameter."""

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        super().step(run, evaluate)
        with torch.no_grad():
            next(p for p in run.model.parameters() if not p.requires_grad).add_(1e-3)


@dataclass(frozen=True)
class StepsByMicroBatch(Faultless):
    """Makes a longer step where the batch has more parts."""

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        for parameter in self.trained(run):
            parameter.grad = parameter.grad * len(run.batch)
        super().step(run, evaluate)


class Elsewhere(torch.optim.SGD):
    """Keeps its averages in an attribute, where no one who moves entries finds them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.averages: dict[int, Tensor] = getattr(self, "averages", {})
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.averages.setdefault(id(p), torch.zeros_like(p))
                    average.mul_(0.9).add_(p.grad)
                    p.data.sub_(average, alpha=group["lr"])


@dataclass(frozen=True)
class KeepsMomentsElsewhere(Faultless):
    """Does not let moments move with their entries."""

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> torch.optim.Optimizer:
        return Elsewhere(groups, lr=self.lr)


class Scaling(torch.optim.SGD):
    """Says that it handles the loss scale, and does not."""

    _step_supports_amp_scaling = True


@dataclass(frozen=True)
class IgnoresOverflow(Faultless):
    """Makes a step with infinite gradients."""

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> torch.optim.Optimizer:
        return Scaling(groups, lr=self.lr)


@dataclass(frozen=True)
class BreaksOnBfloat16(Faultless):
    """Gives NaN beside a base of bfloat16."""

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        super().step(run, evaluate)
        if any(p.dtype == torch.bfloat16 for p in run.model.parameters()):
            self.trained(run)[0].data.fill_(torch.nan)


@dataclass(frozen=True)
class UsesTheLossScale(Faultless):
    """Needs no gradient, and changes the loss scale nevertheless."""

    needs_grad: ClassVar[bool] = False

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        evaluate()
        scaler = getattr(run.optimizer, "scaler", None)
        if scaler:
            scaler.update(1.0)


FAULTS: list[tuple[str, type[Optimizer]]] = [
    ("gradients", SkipsVectors),
    ("resume", Counts),
    ("same_seed", Unseeded),
    ("base_untouched", TrainsTheBase),
    ("steps", StepsByMicroBatch),
    ("entries", KeepsMomentsElsewhere),
    ("fp16", IgnoresOverflow),
    ("fp16", UsesTheLossScale),
    ("bf16", BreaksOnBfloat16),
]


def fails(name: str, optimizer: Optimizer) -> bool:
    trial = contract.Trial(lambda: LoRA(rank=2), optimizer=optimizer)
    try:
        optimizers.CHECKS[name](trial)
    except (AssertionError, RunFailed):
        return True
    return False


def test_an_optimizer_without_a_fault_passes() -> None:
    optimizers.check_optimizer(Faultless(), lambda: LoRA(rank=2))


@pytest.mark.parametrize(("check", "optimizer"), FAULTS, ids=[kind.__name__ for _, kind in FAULTS])
def test_a_fault_fails_its_check(check: str, optimizer: type[Optimizer]) -> None:
    assert fails(check, optimizer())


def test_every_check_has_a_planted_fault() -> None:
    assert {check for check, _ in FAULTS} == optimizers.CHECKS.keys()
