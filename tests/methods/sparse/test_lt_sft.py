"""Test the two phases of LT-SFT against a dense run by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from finetune.config import later
from finetune.core.attach import patched
from finetune.core.method import Method
from finetune.core.sparse.engine import Dense
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.optim.adamw import AdamW
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.one_shot import OneShot
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test

CASES = [
    Case(
        "lt_sft",
        lambda: LTSFT(sparsity=0.9, l1=0.1),
        ("vit", "gpt2"),
        data_dependent=True,
        settings=("schedule.dense=0.5",),
        selectable=False,
    )
]
WARMED = AdamW(lr=1e-2, schedule="linear", warmup=0.4)

PUBLISHED = Published(
    "arXiv 2110.07560: the task scripts of the released code; "
    "3 of 13 epochs are dense for entity recognition",
    {
        "score": "change",
        "scope": "model",
        "schedule": OneShot(dense=3 / 13, lr_schedule="restart"),
        "l1": 0.0,
        "l1_dense": None,
        "decay": "base",
    },
    {"schedule": (OneShot(dense=0.25), "a round number near 3 / 13")},
)

test_contract = contract_test(CASES)

SITES: dict[str, Any] = {"targets": ("v", "up")}


def second_phase(method: LTSFT) -> Any:
    """Return a session before the first step of its second phase, a copy of its model, and the first phase's
    changes."""
    session = contract.begin(method)
    steps = session.steps()
    first = round(0.5 * contract.STEPS)
    for _ in range(first):
        next(steps)
    dense = {n: p.detach().clone() for n, p in session.states["method"].trained().items()}
    previous = session.states["method"]
    session.enter(1)
    session.start(previous)
    return session, dense


def test_chosen_are_the_largest_changes_of_the_model_and_all_is_rewound() -> None:
    session, dense = second_phase(LTSFT(sparsity=0.9, schedule=OneShot(dense=0.5), **SITES))
    assert torch.equal(contract.logits(session.tuned), contract.logits(contract.tiny()))
    bank = session.states["method"]["bank"]
    layers = patched(session.model)
    changes = [(dense[f"{name}.weight"] - layer.original).abs().reshape(-1) for name, layer in layers.items()]
    whole = torch.cat(changes)
    wanted = whole.sort(descending=True, stable=True).indices[: len(whole) - round(0.9 * len(whole))]
    offsets = [0, *torch.tensor([len(c) for c in changes]).cumsum(0).tolist()]
    found = torch.cat([bank.positions(i).long() + offsets[i] for i in range(len(changes))])
    assert set(found.tolist()) == set(wanted.tolist())
    densities = [len(bank.positions(i)) / len(c) for i, c in enumerate(changes)]
    assert max(densities) > min(densities)


def test_only_the_freed_entries_differ_afterwards() -> None:
    session = contract.finish(contract.begin(LTSFT(sparsity=0.95, **SITES)))
    bank = session.states["method"]["bank"]
    changed = 0
    for i, layer in enumerate(patched(session.model).values()):
        differs = (layer.weight != layer.original).reshape(-1).nonzero().view(-1)
        assert set(differs.tolist()) <= set(bank.positions(i).tolist())
        changed += len(differs)
    assert 0 < changed <= len(bank.values)


def test_with_all_entries_the_second_phase_is_dense_training_from_the_start() -> None:
    schedule = OneShot(dense=0.5, lr_schedule="span")  # the plain run takes the second half of a run's rates
    session, _ = second_phase(LTSFT(sparsity=0.0, schedule=schedule, **SITES))
    plain = contract.begin(Dense(**SITES))
    for p, q in zip(plain.states["head"].parameters(), session.states["head"].parameters(), strict=True):
        assert torch.equal(p, q)
    plain.number = session.number
    losses = [[step.loss for step in s.steps()] for s in (session, plain)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    trained = plain.states["method"].trained()
    for name, layer in patched(session.model).items():
        torch.testing.assert_close(layer.weight, trained[f"{name}.weight"].detach(), rtol=1e-3, atol=2e-4)


def rates(method: Method, steps: int) -> list[float]:
    train = replace(contract.TRAIN, steps=steps)
    return [step.lr for step in contract.begin(method, train=train, optimizer=WARMED).steps()]


def test_each_phase_has_the_rates_of_a_run_of_its_length() -> None:
    schedule = OneShot(dense=0.4)
    method = LTSFT(sparsity=0.9, schedule=schedule, **SITES)
    assert rates(method, 10) == rates(Dense(**SITES), 4) + rates(Dense(**SITES), 6)
    spanning = replace(method, schedule=replace(schedule, lr_schedule="span"))
    assert rates(spanning, 10) == rates(Dense(**SITES), 10)


def test_a_restarted_rate_resumes_to_the_bit_in_each_phase() -> None:
    contract.check_resume(contract.Trial(CASES[0].make, optimizer=WARMED))


def test_an_old_run_without_the_setting_spans() -> None:
    old = {"method": {"name": "lt_sft", "schedule": {"name": "one_shot", "dense": 0.5}}}
    assert later.enter(old)["method"]["schedule"]["lr_schedule"] == "span"
    assert "lr_schedule" not in later.without(later.enter(old))["method"]["schedule"]


def test_l1_acts_in_the_dense_phase_on_the_changes_of_all_entries() -> None:
    """Compare value and gradient with the formula in float64."""
    session = contract.begin(LTSFT(sparsity=0.9, l1=0.5, **SITES))
    session.start()
    state, original = session.states["method"], dict(contract.tiny().named_parameters())
    noise = torch.Generator().manual_seed(1)
    total = 0.0
    for name, weight in state.trained().items():
        weight.data += torch.randn(weight.shape, generator=noise)
        total += float((weight - original[name]).detach().double().abs().sum())
    size = sum(p.numel() for p in original.values())
    loss = session.current.loss(session.run, state, None)
    assert float(loss.detach()) == pytest.approx(0.5 * total / size, rel=1e-5)
    grads = torch.autograd.grad(loss, list(state.trained().values()))
    for (name, weight), grad in zip(state.trained().items(), grads, strict=True):
        torch.testing.assert_close(grad, 0.5 / size * (weight - original[name]).detach().sign())


def test_a_large_l1_holds_the_dense_phase_back_unless_it_has_its_own_factor() -> None:
    """The value of an old run's absent factor is 0; the dense phase then has the bits of a run without l1."""

    def moved(**settings: Any) -> dict[str, torch.Tensor]:
        return second_phase(LTSFT(sparsity=0.9, schedule=OneShot(dense=0.5), **SITES, **settings))[1]

    plain, old, both = moved(), moved(l1=100.0, l1_dense=0.0), moved(l1=100.0)
    assert later.LATER["method[lt_sft].l1_dense"] == 0.0
    assert all(torch.equal(old[name], value) for name, value in plain.items())
    assert not any(torch.equal(both[name], value) for name, value in plain.items())


def test_a_factor_of_a_dense_phase_that_does_not_exist_is_refused() -> None:
    LTSFT(schedule=DropGrow(), l1=0.1)
    with pytest.raises(ValueError, match=r"l1_dense=0\.1 has no effect with schedule=drop_grow"):
        LTSFT(schedule=DropGrow(), l1_dense=0.1)


def test_l1_pulls_by_its_weight_over_the_size_of_the_model() -> None:
    session, _ = second_phase(LTSFT(sparsity=0.9, l1=0.5, schedule=OneShot(dense=0.5), **SITES))
    bank = session.states["method"]["bank"]
    bank.values.data.fill_(-0.25)
    loss = session.current.loss(session.run, session.states["method"], None)
    (grad,) = torch.autograd.grad(loss, bank.values)
    size = sum(p.numel() for p in session.model.parameters())
    torch.testing.assert_close(loss.detach(), torch.tensor(0.5 * 0.25 * len(bank.values) / size))
    torch.testing.assert_close(grad, torch.full_like(grad, -0.5 / size))
