"""Each check of the contract finds the fault that it is there for, and no other check does."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from finetune.core.anatomy import Anatomy
from finetune.core.lowrank import LowRank
from finetune.core.method import Method, Reparam, Run
from finetune.core.part import Delta, Edit, Part
from finetune.core.site import Site, find_sites
from finetune.testing import contract
from finetune.testing.cases import SMOKE, checks_for


class Factors(LowRank):
    """A low-rank change without a fault."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.shape, rank=2, alpha=2.0, dropout=0.0)


class Rows(Edit):
    """A factor for each output of a linear layer, as an edit without a fault."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(site.shape[0]))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.s * y

    def fold_into(self, module: nn.Module) -> None:
        factor = 1 + self.gate * self.s
        module.get_parameter("weight").mul_(factor[:, None])
        module.get_parameter("bias").mul_(factor)


class Bottleneck(Edit):
    """A small network behind a module."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(32, 4), nn.Linear(4, 32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        change: Tensor = self.up(torch.tanh(self.down(y)))
        return change


@dataclass(frozen=True)
class Faultless(Reparam):
    """A low-rank change on a few layers."""

    targets: tuple[str, ...] = ("q", "down")
    name: ClassVar[str] = "faultless"
    part: ClassVar[type[Delta]] = Factors

    def delta(self, site: Site) -> Delta:
        return self.part(site)  # type: ignore[call-arg]


class StartsAway(Factors):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        nn.init.constant_(self.b, 0.1)


class StaysOn(Factors):
    @property
    def gate(self) -> float:  # type: ignore[override]
        return 1.0

    @gate.setter
    def gate(self, value: float) -> None: ...


class StoresHalves(Factors):
    def pack(self) -> dict[str, Tensor]:
        return {name: p.detach().half().float() for name, p in self.named_parameters()}

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors)


class AddsMoreThanItForms(Factors):
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return 1.05 * super().linear(x, weight)


class AppliesTheWholeProduct(Factors):
    """Says that it keeps zeros, and adds a product that has values at pruned entries."""

    keeps_zeros = True
    additive = True  # type: ignore[assignment]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ self(weight).T


class HasAnUnusedTensor(Factors):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.unused = nn.Parameter(torch.zeros(3))


class TakesTheDtypeOfTheWeight(Factors):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.to(site.module.weight.dtype)


@dataclass(frozen=True)
class MarksFrozen(Faultless):
    """Leaves a gradient on a frozen parameter."""

    def after_step(self, run: Run, state: Any) -> None:
        frozen = next(p for p in run.model.parameters() if not p.requires_grad)
        frozen.grad = torch.ones_like(frozen)


@dataclass(frozen=True)
class Counts(Faultless):
    """Keeps a number in Python that no checkpoint has, from the fourth step on."""

    def after_step(self, run: Run, state: Any) -> None:
        if run.step >= 3:
            state.count = getattr(state, "count", 0) + 1
            with torch.no_grad():
                next(state.parameters()).mul_(1 + 0.01 * state.count)


@dataclass(frozen=True)
class Unseeded(Faultless):
    """Draws from the system in the first step."""

    def after_step(self, run: Run, state: Any) -> None:
        if run.step == 0:
            with torch.no_grad():
                next(state.parameters()).add_(1e-3 * random.Random(os.urandom(8)).random())


@dataclass(frozen=True)
class SumsOverTheBatch(Faultless):
    """Adds a term that grows with the size of a micro-batch."""

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor:
        total = torch.zeros(())
        for parameter in state.parameters():
            total = total + parameter.square().sum()
        return total * len(batch.ids)


@dataclass(frozen=True)
class EditsLayers(Method):
    """Multiplies the outputs of a few layers, as edits that fold."""

    name: ClassVar[str] = "edits_layers"
    part: ClassVar[type[Edit]] = Rows

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = nn.ModuleDict()
        for site in find_sites(model, ("q", "down")):
            state[site.key] = self.part(site).on(model, site.name)  # type: ignore[call-arg]
        return state


class EditIgnoresItsGate(Rows):
    def _change(self, y: Tensor, x: Tensor | None) -> Tensor:
        return (y + self(y, y)).to(y.dtype)


class FoldsNothing(Rows):
    def fold_into(self, module: nn.Module) -> None:
        pass


class CannotFold(Rows):
    fold_into = Edit.fold_into  # although the method says that it can be merged


@dataclass(frozen=True)
class AdapterOnAttention(Method):
    """A bottleneck behind every attention module, whose outputs are tuples."""

    name: ClassVar[str] = "adapter_on_attention"
    mergeable: ClassVar[bool] = False

    def build(self, model: nn.Module) -> nn.ModuleList:
        state = nn.ModuleList()
        for block in Anatomy.of(model).blocks:
            assert block.attention.place is not None
            state.append(Bottleneck().on(model, block.attention.place.name))
        return state


@dataclass(frozen=True)
class SaysItCannotBeMerged(EditsLayers):
    """Its edits fold, although the method says that no weight can hold them."""

    mergeable: ClassVar[bool] = False


def with_part(part: type[Part]) -> Callable[[], Method]:
    """Make a method that attaches ``part``, and is otherwise without a fault."""
    whole = EditsLayers if issubclass(part, Edit) else Faultless
    return type(f"With{part.__name__}", (whole,), {"part": part})


FAULTS: list[tuple[str, Callable[[], Method]]] = [
    ("step_zero", with_part(StartsAway)),
    ("gradients", with_part(HasAnUnusedTensor)),
    ("gradients", MarksFrozen),
    ("stored", with_part(StoresHalves)),
    ("merge", with_part(AddsMoreThanItForms)),
    ("merge", with_part(FoldsNothing)),
    ("merge", with_part(CannotFold)),
    ("merge", SaysItCannotBeMerged),
    ("resume", Counts),
    ("same_seed", Unseeded),
    ("base_untouched", with_part(StaysOn)),
    ("base_untouched", with_part(EditIgnoresItsGate)),
    ("accumulation", SumsOverTheBatch),
    ("bf16", with_part(TakesTheDtypeOfTheWeight)),
    ("zeros", with_part(AppliesTheWholeProduct)),
]


def failing(make: Callable[[], Method]) -> list[str]:
    """Name the checks that fail."""
    trial, found = contract.Trial(make), []
    for name, check in contract.CHECKS.items():
        try:
            check(trial)
        except AssertionError:
            found.append(name)
    return found


def test_a_method_without_a_fault_passes() -> None:
    assert failing(Faultless) == []
    assert failing(EditsLayers) == []


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_an_adapter_on_attention_passes(kind: contract.Kind) -> None:
    contract.check(AdapterOnAttention, kind)


@pytest.mark.parametrize(("check", "make"), FAULTS, ids=[make.__name__ for _, make in FAULTS])
def test_a_fault_fails_its_check(check: str, make: Callable[[], Method]) -> None:
    with pytest.raises(AssertionError):
        contract.CHECKS[check](contract.Trial(make))


@pytest.mark.slow
@pytest.mark.parametrize(("check", "make"), FAULTS, ids=[make.__name__ for _, make in FAULTS])
def test_a_fault_fails_its_check_alone(check: str, make: Callable[[], Method]) -> None:
    assert failing(make) == [check]


def test_every_check_has_a_planted_fault() -> None:
    assert {check for check, _ in FAULTS} == contract.CHECKS.keys()


def test_a_method_is_trained_once_for_the_checks_of_one_training(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    real = contract.Trained
    monkeypatch.setattr(contract, "Trained", lambda trial: begun.append(trial) or real(trial))
    trial = contract.Trial(Faultless)
    for name in SMOKE:
        contract.CHECKS[name](trial)
    assert len(begun) == 1


def test_only_presets_of_the_sparse_engine_get_the_short_list() -> None:
    from finetune.methods.sparse.lift import LIFT
    from finetune.methods.sparse.lt_sft import LTSFT

    assert checks_for(LIFT()) == SMOKE
    *others, last = contract.CHECKS
    assert last == "zeros"  # tests/methods/test_zeros.py runs it
    assert checks_for(LTSFT()) == checks_for(Faultless()) == tuple(others)
