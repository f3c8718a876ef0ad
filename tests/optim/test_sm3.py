"""SM3 against its definition, entry by entry in plain Python, and against other optimizers.

In special cases SM3 becomes one of those optimizers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from finetune.config.load import load
from finetune.core.site import Site
from finetune.core.sparse.bank import Bank
from finetune.errors import ConfigError
from finetune.methods.sparse.shira import SHiRA
from finetune.optim.adamw import AdamW, AdamWOptimizer
from finetune.optim.sm3 import SM3, SM3Optimizer
from finetune.testing import contract
from finetune.training.session import make_optimizer

Place = tuple[int, ...]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sites(*shapes: tuple[int, int]) -> list[Site]:
    return [Site(f"l{i}", nn.Linear(s[1], s[0]), 0, "q", s) for i, s in enumerate(shapes)]


class Naive:
    """The definition: one accumulator for every index of every dimension, over the entries that are given."""

    def __init__(self, lr: float, eps: float = 1e-8, decay: float = 0.0) -> None:
        self.lr, self.eps, self.decay = lr, eps, decay
        self.sums: dict[tuple[int, int], float] = {}

    def step(self, values: dict[Place, float], grads: dict[Place, float]) -> None:
        found = {}
        for at, g in grads.items():
            found[at] = min(self.sums.get((d, i), 0.0) for d, i in enumerate(at)) + g * g
            values[at] -= self.lr * self.decay * values[at]
            values[at] -= self.lr * g / math.sqrt(found[at] + self.eps)
        for at, v in found.items():
            for d, i in enumerate(at):
                self.sums[d, i] = max(self.sums.get((d, i), 0.0), v)


def entries(t: Tensor) -> dict[Place, float]:
    return {tuple(at): float(t[tuple(at)]) for at in (t == t).nonzero().tolist()}


@pytest.mark.parametrize("shape", [(5,), (4, 3), (1, 4), (2, 3, 2)])
def test_dense_tensors_follow_the_definition(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(noise(*shape))
    values, naive = entries(p.detach()), Naive(0.1, decay=0.2)
    optimizer = SM3Optimizer([{"params": [p], "weight_decay": 0.2}], lr=0.1)
    for step in range(6):
        p.grad = noise(*shape, seed=step)
        optimizer.step()
        naive.step(values, entries(p.grad))
        torch.testing.assert_close(
            p.detach(), torch.tensor(list(values.values()), dtype=torch.float64).view(shape)
        )


def test_for_a_vector_it_is_adagrad() -> None:
    p, q = nn.Parameter(noise(7)), nn.Parameter(noise(7))
    ours, theirs = SM3Optimizer([p], lr=0.1, eps=1e-30), torch.optim.Adagrad([q], lr=0.1, eps=1e-30)
    for step in range(5):
        p.grad, q.grad = noise(7, seed=step), noise(7, seed=step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)


def banked(index: list[list[int]], *shapes: tuple[int, int], room: int = 0) -> Bank:
    bank = Bank(sites(*shapes), sum(map(len, index)) + room).double()
    bank.place([torch.tensor(i, dtype=torch.int32) for i in index])
    return bank


def test_a_bank_with_all_entries_is_the_dense_matrix() -> None:
    bank, dense = (
        banked([list(range(12)), list(range(10))], (4, 3), (2, 5)),
        [nn.Parameter(torch.zeros(4, 3).double()), nn.Parameter(torch.zeros(2, 5).double())],
    )
    ours, theirs = SM3Optimizer([bank.values], lr=0.1, banks=[bank]), SM3Optimizer(dense, lr=0.1)
    for step in range(5):
        grads = noise(4, 3, seed=step), noise(2, 5, seed=step + 50)
        bank.values.grad = torch.cat([g.view(-1) for g in grads])
        for p, grad in zip(dense, grads, strict=True):
            p.grad = grad
        ours.step()
        theirs.step()
        assert torch.equal(bank.values, torch.cat([p.view(-1) for p in dense]))


def test_a_sparse_bank_follows_the_definition_and_keeps_its_sums_when_entries_move() -> None:
    """With slack behind the entries, and a second site that must not mix with the first."""
    chosen, shape = [0, 1, 6, 7], (3, 4)
    bank = banked([chosen, [2, 3]], shape, (2, 2), room=3)
    optimizer, naive, values = (
        SM3Optimizer([bank.values], lr=0.1, banks=[bank]),
        Naive(0.1),
        {divmod(i, 4): 0.0 for i in chosen},
    )
    for step in range(8):
        if step == 4:
            chosen, held = [1, 6, 10, 11], {k: t.clone() for k, t in optimizer.state[bank.values].items()}
            bank.revise([torch.tensor(chosen), torch.tensor([0, 3])], {}, "base")
            values = {divmod(i, 4): values.get(divmod(i, 4), 0.0) for i in chosen}
            assert all(torch.equal(held[k], t) for k, t in optimizer.state[bank.values].items())
        grad = noise(len(bank.values), seed=step)
        grad[6:] = 0
        bank.values.grad = grad
        sums = {k: t.clone() for k, t in optimizer.state[bank.values].items()}
        optimizer.step()
        naive.step(values, {divmod(i, 4): float(g) for i, g in zip(chosen, grad, strict=False)})
        torch.testing.assert_close(
            bank.slice(0).detach(), torch.tensor([values[divmod(i, 4)] for i in chosen], dtype=torch.float64)
        )
        assert not bank.values[6:].any()
        state = optimizer.state[bank.values]
        assert all(bool((state[k] >= sums[k]).all()) for k in sums), "an accumulator fell"
        assert {tuple(t.shape) for t in state.values()} == {(3, 1), (1, 4), (2, 1), (1, 2)}
        for d, found in enumerate((state["row.0"].view(-1), state["col.0"].view(-1))):
            torch.testing.assert_close(
                found,
                torch.tensor([naive.sums.get((d, i), 0.0) for i in range(len(found))], dtype=torch.float64),
            )
    assert float(optimizer.state[bank.values]["row.0"][2]) > 0  # it got entries in the middle


def test_a_row_without_entries_stays_at_zero() -> None:
    bank = banked([[0, 1, 6, 7]], (3, 4))
    optimizer = SM3Optimizer([bank.values], lr=0.1, banks=[bank])
    for step in range(3):
        bank.values.grad = noise(4, seed=step)
        optimizer.step()
    assert optimizer.state[bank.values]["row.0"].view(-1).bool().tolist() == [True, True, False]


def test_saved_state_resumes_to_the_bit() -> None:
    def made(bank: Bank, head: nn.Parameter) -> SM3Optimizer:
        return SM3Optimizer([bank.values, head], lr=0.1, banks=[bank])

    bank, head = banked([[0, 1, 6, 7]], (3, 4)), nn.Parameter(noise(2, 3))
    first = made(bank, head)
    ends: list[tuple[Tensor, Tensor]] = []

    def step(optimizer: SM3Optimizer, seed: int) -> None:
        params: Any = optimizer.param_groups[0]["params"]
        for p in params:
            p.grad = noise(*p.shape, seed=seed)
        optimizer.step()

    step(first, 1)
    other, copy = banked([[0, 1, 6, 7]], (3, 4)), nn.Parameter(head.detach().clone())
    other.values.data.copy_(bank.values.data)
    second, saved = made(other, copy), first.state_dict()
    groups = json.loads(json.dumps(saved["param_groups"]))
    second.load_state_dict(
        {
            "state": {i: {k: t.clone() for k, t in s.items()} for i, s in saved["state"].items()},
            "param_groups": groups,
        }
    )
    for optimizer, values, dense in ((first, bank.values, head), (second, other.values, copy)):
        step(optimizer, 2)
        ends.append((values.detach(), dense.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_loop_makes_what_the_settings_name() -> None:
    states = contract.begin(SHiRA(sparsity=0.9)).states
    bank = next(m for m in states.modules() if isinstance(m, Bank))
    sm3 = make_optimizer(states, SM3(lr=0.3, eps=1e-6, weight_decay=0.1))
    assert isinstance(sm3, SM3Optimizer)
    assert [g["weight_decay"] for g in sm3.param_groups] == [0.1, 0.0]
    assert {(g["lr"], g["eps"]) for g in sm3.param_groups} == {(0.3, 1e-6)}
    assert sm3.state[bank.values]["row.0"].shape == (bank.shapes[0][0], 1)
    adamw = make_optimizer(states, AdamW(betas=(0.8, 0.9)))
    assert isinstance(adamw, AdamWOptimizer)
    assert not adamw.aged
    assert {g["betas"] for g in adamw.param_groups} == {(0.8, 0.9)}
    bank.ages = True
    aged = make_optimizer(states, AdamW())
    assert isinstance(aged, AdamWOptimizer)
    assert [id(p) for p in aged.aged] == [id(bank.values)]


def test_betas_are_refused_where_there_are_none() -> None:
    with pytest.raises(ConfigError) as caught:
        load(["optimizer=sm3", "optimizer.betas=[0.9,0.99]"])
    (fault,) = caught.value.faults
    assert fault.startswith("optimizer.betas=[0.9, 0.99] (command line) is not a setting of optimizer=sm3.")


def test_the_betas_that_sm3_never_had_stay_in_its_configurations(tmp_path: Path) -> None:
    """Earlier versions wrote AdamW's default into every configuration, so the hash covers it."""
    config = load(["optimizer=sm3", "optimizer.betas=[0.9,0.999]"])
    assert config == load(["optimizer=sm3"])
    assert config.as_dict()["optimizer"]["betas"] == [0.9, 0.999]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    assert load([], None, file) == config
