"""Phases whose parts stay: the next one trains on top of them, and all is stored, merged and resumed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from finetune.config.load import load
from finetune.core.attach import base, detach, merge, trained_in_place
from finetune.core.method import Method, Phase
from finetune.core.objective import Objective
from finetune.data.encode import collate
from finetune.errors import ConfigError
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.snell import SNELL
from finetune.methods.sparse.shira import SHiRA
from finetune.objectives.kd import KD
from finetune.testing import contract
from finetune.training.plan import plan
from finetune.training.prepare import count_parameters
from finetune.training.session import Session

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stacked(Method):
    """LoRA for half of the run, then SHiRA on top of it."""

    name: ClassVar[str] = "stacked"
    objective: Objective | None = None

    def phases(self) -> tuple[Phase, ...]:
        first, second = LoRA(rank=2), SHiRA(sparsity=0.9)
        return Phase(first, 0.5, keeps=True), Phase(second, 0.5, objective=self.objective)


@dataclass(frozen=True)
class Three(Method):
    """Two phases that keep their parts, and a third."""

    name: ClassVar[str] = "three"

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(LoRA(rank=2), 1 / 3, keeps=True),
            Phase(SHiRA(sparsity=0.9), 1 / 3, keeps=True),
            Phase(LoRA(rank=1), 1 / 3),
        )


@pytest.mark.parametrize("make", [Stacked, Three])
@pytest.mark.parametrize("check", contract.CHECKS)
def test_contract(check: str, make: Any) -> None:
    trial = TRIALS.setdefault(make, contract.Trial(make))
    contract.CHECKS[check](trial)


TRIALS: dict[Any, contract.Trial] = {}


def in_second_phase(objective: Objective | None = None) -> tuple[Session, State, torch.Tensor]:
    """Train to the first step of the second phase; return what the first phase left, and its logits."""
    session = contract.begin(Stacked(objective))
    steps = session.steps()
    for _ in range(contract.STEPS // 2):
        next(steps)
    left = {name: tensor.clone() for name, tensor in session.states.state_dict().items()}
    logits = contract.logits(session.tuned)
    session.tuned.train()
    next(steps)
    return session, left, logits


def test_what_the_first_phase_left_stays_to_the_bit_and_the_head_is_trained_on() -> None:
    session, left, _ = in_second_phase()
    contract.finish(session)
    now = session.states.state_dict()
    kept = {name: tensor for name, tensor in now.items() if name.startswith("kept.")}
    assert len(kept) == sum(name.startswith("method.") for name in left)
    for name, tensor in kept.items():
        assert torch.equal(tensor, left[name.replace("kept.0.", "method.")]), name
    for name in (name for name in left if name.startswith("head.")):
        assert not torch.equal(now[name], left[name])
    assert not any(p.requires_grad for p in session.states["kept"].parameters())
    optimized = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in session.states["kept"].parameters()}


def test_merging_writes_the_changes_of_both_phases() -> None:
    session, _, _ = in_second_phase()
    contract.finish(session)
    changes = {}
    for name, layer in session.model.named_modules():
        if hasattr(layer, "deltas"):
            assert len(layer.deltas) == 2
            changes[name] = sum(delta(layer.original).detach() for delta in layer.deltas)
    merge(session.model, session.states)
    assert changes
    for name, change in changes.items():
        expected = contract.tiny().get_submodule(name).weight + change
        torch.testing.assert_close(session.model.get_submodule(name).weight, expected)


def test_previous_is_the_model_that_the_first_phase_left() -> None:
    """With the head of now, which in the first step after the change is still nearly that of then."""
    session, left, logits = in_second_phase(KD(teacher="previous"))
    with torch.no_grad():
        for name, parameter in session.states["head"].named_parameters():
            parameter.copy_(left[f"head.{name}"])
    batch = collate(contract.examples()[:5])
    assert torch.equal(session.run.reference("previous")(batch).logits, logits)
    taught = session.run.reference("base")(batch).logits
    with base(session.states["kept"]), base(session.states["method"]):
        assert torch.equal(taught, contract.logits(session.tuned))
    assert not torch.equal(taught, logits)


def test_each_phase_minimizes_its_own_objective() -> None:
    session = contract.begin(Stacked(KD(task=0.0, kl=1.0)))
    terms = [sorted(name for name in step.metrics if name.startswith("loss_")) for step in session.steps()]
    assert session.compute.objective == KD(task=0.0, kl=1.0)
    assert terms == [[]] * contract.STEPS  # an objective with one term logs only its loss
    session = contract.begin(Stacked(KD()))
    terms = [sorted(name for name in step.metrics if name.startswith("loss_")) for step in session.steps()]
    assert terms == [[]] * 3 + [["loss_kl", "loss_task"]] * 3


def test_previous_needs_a_phase_below() -> None:
    with pytest.raises(ConfigError, match="phase 1 of method=lora has none below it"):
        contract.begin(LoRA(rank=2), objective=KD(teacher="previous"))


def test_previous_computes_without_the_dropout_of_kept_parts() -> None:
    session = contract.begin(WithDropout())
    steps = session.steps()
    for _ in range(contract.STEPS // 2 + 1):
        next(steps)
    batch, reference = collate(contract.examples()[:5]), session.run.reference("previous")
    session.tuned.train()
    assert torch.equal(reference(batch).logits, reference(batch).logits)
    assert all(module.training for module in session.tuned.modules())


def test_the_base_and_the_trained_values_come_back_where_three_phases_train_one_parameter() -> None:
    session = contract.begin(SameToken())
    start = session.model.get_parameter(TOKEN).detach().clone()
    contract.finish(session)
    trained = session.model.get_parameter(TOKEN).detach().clone()
    assert not torch.equal(trained, start)
    with base(session.states):
        assert torch.equal(session.model.get_parameter(TOKEN), start)
    assert torch.equal(session.model.get_parameter(TOKEN), trained)
    assert trained_in_place(session.states)[TOKEN] is session.model.get_parameter(TOKEN)
    detach(session.model, session.states)
    assert torch.equal(session.model.get_parameter(TOKEN), start)


TOKEN = "vit.embeddings.cls_token"


@dataclass(frozen=True)
class WithDropout(Method):
    """LoRA with dropout, then SHiRA taught by what LoRA left."""

    name: ClassVar[str] = "with_dropout"

    def phases(self) -> tuple[Phase, ...]:
        taught = KD(teacher="previous")
        first, second = LoRA(rank=2, dropout=0.5), SHiRA(sparsity=0.9)
        return Phase(first, 0.5, keeps=True), Phase(second, 0.5, objective=taught)


@dataclass(frozen=True)
class SameToken(Method):
    """SNELL three times; each trains the class token in place."""

    name: ClassVar[str] = "same_token"

    def phases(self) -> tuple[Phase, ...]:
        phase = Phase(SNELL(rank=2), 1 / 3, keeps=True)
        return phase, phase, Phase(SNELL(rank=2), 1 / 3)


def test_a_plan_bounds_what_all_phases_that_stay_can_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.methods.sparse.shira.SHiRA.phases", two_phases)
    config = load(["method=shira", "method.sparsity=0.9", "train.steps=2", "train.threads=1"])
    bound = plan(config)["changed_at_most"]
    assert bound > 0.2  # a tenth of the entries of the layers twice, and the head


def two_phases(method: SHiRA) -> tuple[Phase, ...]:
    return Phase(method, 0.5, keeps=True), Phase(method, 0.5)


def test_what_earlier_phases_left_is_counted_as_trained() -> None:
    session, left, _ = in_second_phase()
    setup: Any = SimpleNamespace(session=session, total=1)
    now = sum(p.numel() for p in session.states.parameters() if p.requires_grad)
    before = sum(tensor.numel() for name, tensor in left.items() if name.startswith("method."))
    assert count_parameters(setup)["trained"] == now + before
