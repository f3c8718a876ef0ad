"""Test the two phases of LT-SFT against a dense run by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from finetune.config import later
from finetune.core.attach import patched
from finetune.core.method import Method
from finetune.core.sparse.engine import Dense
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.optim.adamw import AdamW
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
    {"score": "change", "scope": "model", "schedule": OneShot(dense=3 / 13), "l1": 0.0, "decay": "base"},
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


def test_l1_pulls_by_its_weight_over_the_size_of_the_model() -> None:
    session, _ = second_phase(LTSFT(sparsity=0.9, l1=0.5, schedule=OneShot(dense=0.5), **SITES))
    bank = session.states["method"]["bank"]
    bank.values.data.fill_(-0.25)
    loss = session.current.loss(session.run, session.states["method"], None)
    (grad,) = torch.autograd.grad(loss, bank.values)
    size = sum(p.numel() for p in session.model.parameters())
    torch.testing.assert_close(loss.detach(), torch.tensor(0.5 * 0.25 * len(bank.values) / size))
    torch.testing.assert_close(grad, torch.full_like(grad, -0.5 / size))
