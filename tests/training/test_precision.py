"""Compare mixed precision with float32, and check that an overflow of fp16 moves no schedule.

All runs are on the CPU, where torch has autocast and a loss scaler as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.core.method import Method
from finetune.core.run import Run, Seen
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.amt import AMT
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.snell import SNELL
from finetune.methods.reparam.snella import SNELLA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.sparse import Crossing
from finetune.methods.sparse.spiel import SpIEL
from finetune.objectives.task import Task
from finetune.schedules.drop_grow import DropGrow
from finetune.selectors.ist import IST
from finetune.testing import contract, sessions
from finetune.training import session as session_module
from finetune.training.session import NotFinite, Session, Step

METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(rank=4),
    "full": Full,
    "snell": lambda: SNELL(rank=4, sparsity=0.0),
    "shira": lambda: SHiRA(sparsity=0.5),
}
SCHEDULED: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(rank=2),
    "shira": lambda: SHiRA(sparsity=0.9),
    "drop_grow": lambda: Crossing(sparsity=0.9, score="gradient", schedule=DropGrow(every=2)),
    "spiel": lambda: SpIEL(sparsity=0.9, schedule=DropGrow(every=3), window=2),
    "snella": lambda: SNELLA(rank=4, every=2),
    "amt": AMT,
}
# Of logits and losses, after six steps that move logits by 0.5; bfloat16 has 8 bits, float16 has 11.
TOLERANCE = {"bf16": 0.01, "fp16": 0.001}


@contextmanager
def scaled(scale: float = 2.0**16, autocast: bool = True) -> Iterator[None]:
    """Give sessions on the CPU float16 autocast and a loss scale, as train.precision=fp16 does on a GPU."""
    real = sessions.make_accelerator

    def make(train: Any) -> Any:
        accelerator = real(train)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        if not autocast:
            accelerator.autocast = nullcontext
        return accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "make_accelerator", make)
        yield


def ended(session: Session) -> tuple[list[float], Tensor]:
    losses = [step.loss for step in session.steps()]
    return losses, contract.logits(session.tuned)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_stays_near_that_in_float32(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sessions, "OPTIMIZER", replace(sessions.OPTIMIZER, eps=1e-2)
    )  # a gradient of nothing but noise moves nothing
    before, kinds = contract.logits(contract.begin(LoRA(rank=2)).tuned), set[torch.dtype]()
    exact, logits = ended(contract.begin(METHODS[name]()))
    with scaled() if precision == "fp16" else nullcontext():
        session = contract.begin(
            METHODS[name](),
            train=replace(contract.TRAIN, precision=precision if precision == "bf16" else "fp32"),
        )
        session.model.vit.layers[0].mlp.register_forward_hook(
            lambda module, args, output: kinds.add(output.dtype)
        )
        losses, found = ended(session)
    assert kinds >= {torch.bfloat16 if precision == "bf16" else torch.float16}, (
        "it was computed in half precision"
    )
    assert losses == pytest.approx(exact, abs=TOLERANCE[precision])
    torch.testing.assert_close(found, logits, atol=TOLERANCE[precision], rtol=TOLERANCE[precision])
    assert float((logits - before).abs().max()) > 0.4, "training moved much more than the tolerance"


class Overflow:
    """Make one gradient infinite in the steps ``at`` (from 0), until the loss scale is at most ``most``."""

    def __init__(self, session: Session, at: set[int], most: float) -> None:
        self.session, self.at, self.most, self.count = session, at, most, 0
        self.real, session._backward = session._backward, self  # type: ignore[method-assign]

    def __call__(self, micro: Any) -> float:
        loss = self.real(micro)
        if self.session.number in self.at and self.session.accelerator.scaler.get_scale() > self.most:
            self.count += 1
            next(p for p in self.session.states.parameters() if p.grad is not None).grad.view(-1)[0] = (
                torch.inf
            )
        return loss


def steps_of(session: Session) -> list[tuple[Any, ...]]:
    return [(s.number, s.loss, s.lr, sorted(s.metrics.items())) for s in session.steps()]


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("name", SCHEDULED)
def test_an_overflow_moves_no_schedule(name: str, clip: float | None) -> None:
    """The oracle starts with the loss scale that overflows in steps 1 and 4 leave to the other run.

    A power of two as scale changes no bit. What remains is what an overflow may have moved: rates, entries,
    ages, random numbers, counts of steps.
    """
    train = replace(contract.TRAIN, clip=clip)
    with scaled(autocast=False):
        session = contract.begin(SCHEDULED[name](), train=train)
        overflow = Overflow(session, {0, 3}, 2.0**12)
        found = steps_of(session)
    with scaled(2.0**12, autocast=False):
        told = contract.begin(SCHEDULED[name](), train=train)
        wanted = steps_of(told)
    assert overflow.count == 4, "from 2**16 down to 2**12, in the first step"
    assert [step[:1] + step[2:] for step in found] == [step[:1] + step[2:] for step in wanted]
    assert [step[1] for step in found] == [step[1] for step in wanted]
    contract.same_values(session.states, told.states)
    left, right = session.optimizer.state_dict()["state"], told.optimizer.state_dict()["state"]
    for place, entry in left.items():
        for key, t in entry.items():
            assert torch.equal(t, right[place][key]), key


def test_an_overflow_in_the_middle_and_a_selector() -> None:
    with scaled(autocast=False):
        session = contract.begin(LoRA(rank=2), selector=IST(every=2))
        overflow = Overflow(session, {3}, 2.0**15)
        found = steps_of(session)
        plain = contract.begin(LoRA(rank=2), selector=IST(every=2))
        wanted = steps_of(plain)
    assert overflow.count == 1
    assert found == wanted
    contract.same_values(session.states, plain.states)


def test_a_gradient_that_overflows_at_every_scale_is_a_failure_of_the_run() -> None:
    with scaled(autocast=False):
        session = contract.begin(LoRA(rank=2))
        overflow = Overflow(session, {2}, 0.0)
        with pytest.raises(NotFinite, match="gradient at every loss scale is inf at step 3") as caught:
            contract.finish(session)
    assert overflow.count == session_module.LOSS_SCALES
    assert len(caught.value.ids) == 5
    assert session.number == 2


def test_the_scale_is_part_of_a_checkpoint() -> None:
    with scaled(autocast=False):
        resumed, session = contract.begin(LoRA(rank=2)), contract.begin(LoRA(rank=2))
        Overflow(session, {0}, 2.0**10)
        steps = session.steps()
        first: Step = next(steps)
        assert first.number == 1
        resumed.load_state_dict(copy.deepcopy(session.state_dict()))
        assert resumed.accelerator.scaler.get_scale() == 2.0**10
        assert [s.loss for s in resumed.steps()] == [s.loss for s in steps]
        contract.same_values(session.states, resumed.states)


@dataclass(frozen=True)
class Small(Task):
    """The task's loss, shrunk to 1e-6."""

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        return {name: term * 1e-6 for name, term in super().terms(run, seen, batch).items()}


def test_gradients_that_choose_entries_do_not_vanish_in_fp16() -> None:
    """In float16, without a loss scale, every gradient of so small a loss would be 0."""

    def chosen(session: Session) -> Tensor:
        session.start()
        bank = session.states["method"]["bank"]
        return torch.cat([bank.positions(i) + i * 10_000 for i in range(len(bank.sizes))])

    method = Crossing(sparsity=0.9, score="gradient")
    exact = set(chosen(contract.begin(method, objective=Small())).tolist())
    with scaled():
        found = set(chosen(contract.begin(method, objective=Small())).tolist())
    assert len(exact & found) > 0.9 * len(exact)
