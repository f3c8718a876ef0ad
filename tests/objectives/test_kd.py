"""Compare distillation with its formula in float64, and with copies of the model as teachers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.core.distillation import sum_divergence
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.objectives.kd import KD
from finetune.testing import contract, objectives
from finetune.training.reference import References
from finetune.training.session import Session


def test_divergence_is_its_formula() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = (t.div(3).exp() / t.div(3).exp().sum(-1, keepdim=True) for t in (teacher, student))
    wanted = 9 * (p * (p / q).log()).sum()
    torch.testing.assert_close(sum_divergence(student, teacher, 3.0), wanted)
    assert abs(float(sum_divergence(student, student, 3.0))) < 1e-12


def test_at_a_high_temperature_the_gradient_is_that_of_half_the_squared_difference_of_centred_logits() -> (
    None
):
    """The paper's section 2.1: with T^2, for T -> infinity, it is (z - v) / N for logits of mean 0."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 6, dtype=torch.float64)
    student = (student - student.mean()).requires_grad_()
    teacher = teacher - teacher.mean()
    (gradient,) = torch.autograd.grad(sum_divergence(student, teacher, 1e4).sum(), student)
    torch.testing.assert_close(gradient, (student.detach() - teacher) / 6, rtol=1e-3, atol=1e-6)


def first_batch(session: Session) -> Any:
    (batch,) = next(session.batches.steps(0, 1))
    return batch


def loss_of(session: Session) -> float:
    session.tuned.eval()
    return session._backward(next(session.batches.steps(0, 1)))


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_the_base_agrees_with_itself_before_training(kind: Any) -> None:
    objective = KD(task=0.0, kl=1.0)
    session = contract.Trial(lambda: LoRA(rank=2), kind, objective=objective).begin()
    session.start()
    assert abs(loss_of(session)) < 1e-6


class Moved:
    """A session after two steps of training, and its base with the head of now, made by hand."""

    def __init__(self, make: Any, objective: KD) -> None:
        self.session = contract.Trial(make, objective=objective).begin()
        steps = self.session.steps()
        next(steps), next(steps)
        self.teacher = contract.tiny()
        head = self.session.states["head"].trained()
        for name, parameter in head.items():
            self.teacher.get_parameter(name).data.copy_(parameter.data)
        for name, before in contract.tiny().named_parameters():
            if name in head:
                assert not torch.equal(before, head[name]), "the head has not moved, so the test is void"

    def logits(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.teacher(**first_batch(self.session).inputs).logits
        return found


@pytest.mark.parametrize("make", [lambda: LoRA(rank=2), Full], ids=["shared", "read"])
def test_the_teacher_is_the_base_with_the_new_head_as_it_is_now(make: Any) -> None:
    moved = Moved(make, KD())
    taught = moved.session.run.reference("base")(first_batch(moved.session)).logits
    torch.testing.assert_close(taught, moved.logits(), rtol=0, atol=1e-6)
    live = contract.logits(moved.session.tuned)
    assert not torch.allclose(live, contract.logits(contract.tiny()))


@pytest.mark.parametrize("make", [lambda: LoRA(rank=2), Full], ids=["shared", "read"])
def test_a_head_that_came_with_the_checkpoint_is_the_teacher_s_own(make: Any) -> None:
    session = contract.Trial(make, objective=KD()).begin()
    steps = session.steps()
    next(steps), next(steps)
    references = References(replace(session.pretrained, new_head=False), session.accelerator)
    references.enter(session.states, ())
    batch = first_batch(session)
    with torch.no_grad():
        wanted = contract.tiny()(**batch.inputs).logits
    torch.testing.assert_close(references.get("base")(batch).logits, wanted, rtol=0, atol=1e-6)


def test_full_fine_tuning_reads_the_base_once() -> None:
    read: list[int] = []

    def reload() -> Any:
        read.append(1)
        return contract.tiny()

    session = contract.Trial(Full, objective=KD()).begin()
    pretrained = replace(session.pretrained, model=contract.tiny(), reload=reload)
    contract.finish(Session(pretrained, session.recipe, session.batches, session.accelerator))
    assert len(read) == 1


def test_the_reference_leaves_no_trace() -> None:
    """It keeps training mode, gates and random numbers, and its parameters get no gradient."""
    session = contract.Trial(Full, objective=KD()).begin()
    session.start()
    session.tuned.train()
    before = torch.get_rng_state()
    reference = session.run.reference("base")
    reference(first_batch(session))
    assert session.model.training
    assert torch.equal(torch.get_rng_state(), before)
    loss_of(session)
    trained = {id(p) for p in session.states.parameters()}
    for parameter in reference.model.parameters():
        assert id(parameter) in trained or parameter.grad is None


def test_terms_are_logged() -> None:
    session = contract.Trial(lambda: LoRA(rank=2), objective=KD()).begin()
    step = next(session.steps())
    assert step.loss == pytest.approx(0.5 * step.metrics["loss_task"] + 0.5 * step.metrics["loss_kl"])


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.task, objective\.kl are all 0"):
        KD(task=0.0, kl=0.0)


@pytest.mark.parametrize(
    ("make", "kind"), [(lambda: LoRA(rank=2), "vit"), (Full, "vit"), (lambda: LoRA(rank=2), "gpt2")]
)
def test_contract(make: Any, kind: Any) -> None:
    objectives.check_objective(KD(), make, kind)
