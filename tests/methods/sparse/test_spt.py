"""Test SPT against gradients of the plain model by autograd, and against its rule tried at every tau."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.artifacts.compose import sparse_changes
from finetune.core.attach import patched
from finetune.core.sparse.mixed import Mixed, MixedDelta
from finetune.data.encode import collate
from finetune.errors import ConfigError
from finetune.methods.sparse.spt import SPT, divide_budget
from finetune.storage.delta import load_delta, save_delta, tensors_to_store
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test
from finetune.training.session import Session

CASES = [
    Case(
        "spt",
        lambda: SPT(sparsity=0.9, rank=4, alpha=4.0, batches=2),
        ("vit", "gpt2"),
        data_dependent=True,
        settings=("method.batches=2",),
    )
]

PUBLISHED = Published(
    "arXiv 2303.08566: the released code",
    {"rank": 8, "alpha": 10.0, "batches": 16, "class_token": True, "class_token_decay": False},
)

test_contract = contract_test(CASES)

BOTH = SPT(
    sparsity=0.9, rank=4, alpha=4.0, batches=2
)  # of the tiny model some matrices get a branch, some entries


def started(method: SPT, seed: int = 0) -> Session:
    session = contract.begin(method, train=replace(contract.TRAIN, clip=None), seed=seed)
    session.start()
    return session


def bank_of(session: Session) -> Mixed:
    bank: Mixed = session.states["method"]["bank"]
    return bank


def places(session: Session) -> list[Tensor]:
    return [bank_of(session).positions(i).long().clone() for i in range(len(bank_of(session).sizes))]


def gradients(model: nn.Module, names: list[str], batch: Any) -> list[Tensor]:
    """Return the dense gradient of the mean loss, by autograd."""
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    loss = nn.functional.cross_entropy(model(pixel_values=batch.inputs["pixel_values"]).logits, batch.labels)
    return list(torch.autograd.grad(loss, weights))


def batches(session: Session, count: int) -> list[Any]:
    """Return the batches of the next steps; each step has one micro-batch."""
    found = []
    for (batch,) in session.batches.steps(0, count):
        assert batch is not None
        found.append(collate([contract.examples()[int(i)] for i in batch.ids]))
    return found


def tried(
    scores: list[Tensor], branches: list[int], alpha: float, budget: int
) -> tuple[list[list[int]], list[bool], int]:
    """Try the rule at every tau, and return the division at the largest tau within the budget.

    That is the places of each site's entries, which sites get a branch, and the cost.
    """
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    site = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    one_more = site[order][:, None] == torch.arange(len(scores))
    counts = torch.cat([torch.zeros(1, len(scores), dtype=torch.int64), one_more.cumsum(0)])  # [tau, site]
    structured = counts >= torch.tensor(branches) / alpha
    cost = torch.where(structured, torch.tensor(branches), counts).sum(1)
    tau = int((cost <= budget).nonzero().max())
    entries = order[:tau].sort().values
    starts = [sum(len(s) for s in scores[:i]) for i in range(len(scores))]
    own = [
        [] if structured[tau, i] else (entries[site[entries] == i] - start).tolist()
        for i, start in enumerate(starts)
    ]
    return own, structured[tau].tolist(), int(cost[tau])


@pytest.mark.parametrize("seed", range(12))
def test_division_is_that_of_the_best_tau(seed: int) -> None:
    """The numbers are small, with many ties, so that every tau can be tried."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 40, (5,), generator=generator).tolist()
    branches = torch.randint(2, 30, (5,), generator=generator).tolist()
    alpha, budget = [1.0, 2.5, 10.0][seed % 3], int(torch.randint(0, 90, (), generator=generator))
    levels = 6 if seed % 2 else 10**6
    scores = [torch.randint(0, levels, (n,), generator=generator).float() for n in sizes]
    limits = [math.ceil(p / alpha) for p in branches]
    at = [
        s.sort(descending=True, stable=True).indices[:limit].sort().values
        for s, limit in zip(scores, limits, strict=True)
    ]
    chosen, structured = divide_budget(
        [s[a] for s, a in zip(scores, at, strict=True)], limits, branches, budget
    )
    entries, expected, cost = tried(scores, branches, alpha, budget)
    assert structured.tolist() == expected
    assert [a[c].tolist() for a, c in zip(at, chosen, strict=True)] == entries
    assert (
        sum(int(c.sum()) for c in chosen) + sum(p for p, s in zip(branches, expected, strict=True) if s)
        == cost
    )


@pytest.mark.parametrize(
    "method", [BOTH, replace(BOTH, alpha=1.0, sparsity=0.7), replace(BOTH, batches=1, rank=1)]
)
def test_selection_is_global_over_the_squared_gradients_of_batches(method: SPT) -> None:
    session, model = started(method), contract.tiny().requires_grad_(False)
    names = list(patched(session.model))
    scores = [torch.zeros(layer.original.numel()) for layer in patched(session.model).values()]
    for batch in batches(session, method.batches):
        for total, grad in zip(scores, gradients(model, names, batch), strict=True):
            total += grad.reshape(-1).square()
    shapes = [layer.original.shape for layer in patched(session.model).values()]
    size = sum(map(len, scores))
    branches = [method.rank * sum(shape) for shape in shapes]
    entries, structured, cost = tried(scores, branches, method.alpha, size - round(method.sparsity * size))
    bank = bank_of(session)
    assert bank.structured.tolist() == structured
    assert [p.tolist() for p in places(session)] == entries
    assert bank.active == cost <= len(bank.values)


def test_a_matrix_has_a_branch_or_entries_and_the_branch_starts_at_nothing() -> None:
    session = started(BOTH)
    bank, structured = bank_of(session), bank_of(session).structured.tolist()
    assert 1 < sum(structured) < len(structured) - 1
    for i, view in enumerate(session.states["method"]["views"]):
        assert view.additive == structured[i]
        assert not view(torch.zeros(view.site.shape)).any()
        if structured[i]:
            a, b = view.factors()
            assert not len(bank.positions(i))
            assert a.shape == (4, view.site.shape[1])
            assert b.shape == (view.site.shape[0], 4)
            assert not b.any()
            limit = view.site.shape[1] ** -0.5  # kaiming uniform with a = sqrt(5)
            assert 0.9 * limit < a.abs().max() <= limit
            assert abs(float(a.detach().mean())) < 0.2 * limit


def test_gradients_are_the_dense_one_gathered_and_by_the_chain_rule() -> None:
    session = started(BOTH)
    bank, names = bank_of(session), list(patched(session.model))
    bank.values.data[: bank.active] += 0.05 * torch.randn(
        bank.active, generator=torch.Generator().manual_seed(0)
    )
    plain = contract.tiny().requires_grad_(False)
    for name, layer in patched(session.model).items():
        plain.get_submodule(name).weight.data = layer.weight
    (batch,) = batches(session, 1)
    dense = gradients(plain, names, batch)
    session.model.eval()
    nn.functional.cross_entropy(
        session.model(pixel_values=batch.inputs["pixel_values"]).logits, batch.labels
    ).backward()
    assert bank.values.grad is not None
    for i, (view, g) in enumerate(zip(session.states["method"]["views"], dense, strict=True)):
        found = bank.values.grad[bank.bounds()[i] : bank.bounds()[i + 1]]
        if view.additive:
            a, b = view.factors()
            expected = torch.cat([(b.T @ g).reshape(-1), (g @ a.T).reshape(-1)])
        else:
            expected = g.reshape(-1)[bank.positions(i).long()]
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-4)
    assert not bank.values.grad[bank.active :].any()


def test_entries_that_were_not_chosen_never_change_and_branches_have_their_rank() -> None:
    session = contract.finish(started(BOTH))
    for place, (name, layer), view in zip(
        places(session), patched(session.model).items(), session.states["method"]["views"], strict=True
    ):
        base = contract.tiny().get_submodule(name).weight
        changed = (layer.weight != base).view(-1).nonzero().view(-1)
        if view.additive:
            assert int(torch.linalg.matrix_rank((layer.weight - base).double(), tol=1e-6)) == 4
        else:
            assert set(changed.tolist()) <= set(place.tolist())
    assert not bank_of(session).values[bank_of(session).active :].any()


def chosen_with(
    session: Session, upcoming: list[list[Any]], factor: float = 1.0
) -> tuple[list[list[int]], list[bool]]:
    """Return the choice made from these micro-batches with a scaled loss."""

    def backward(batch: Any, micro: list[Any], summed: bool, in_training: bool) -> None:
        loss = nn.functional.cross_entropy(session.tuned(**batch.inputs).logits, batch.labels)
        (factor * loss * len(batch.ids) / sum(len(b.ids) for b in micro)).backward()

    session.tuned.eval()
    session.run.upcoming, session.run.backward = (lambda n: upcoming), backward
    bank_of(session).structured.zero_()
    bank_of(session).place([torch.zeros(0, dtype=torch.int32)] * len(bank_of(session).sizes))
    session.current.begin(session.run, session.states["method"], None)
    return [p.tolist() for p in places(session)], bank_of(session).structured.tolist()


def test_scale_and_order_of_batches_do_not_matter_and_their_division_does() -> None:
    session = started(BOTH)
    first, second = batches(session, 2)
    plain = chosen_with(session, [[first], [second]])
    assert chosen_with(session, [[first], [second]], factor=8.0) == plain
    assert chosen_with(session, [[second], [first]]) == plain
    halves = [collate([contract.examples()[int(i)] for i in part]) for part in (first.ids[:4], first.ids[4:])]
    assert chosen_with(session, [halves, [second]])[1] == plain[1]  # one batch in two micro-batches
    assert chosen_with(session, [[halves[0]], [halves[1]], [second]]) != plain


@pytest.mark.parametrize(
    "make", [lambda: BOTH, lambda: replace(BOTH, sparsity=0.999), lambda: replace(BOTH, sparsity=0.0)]
)
def test_comes_back_from_disk_whatever_the_seed(make: Callable[[], SPT], tmp_path: Path) -> None:
    """The cases are entries alone, entries and branches, and branches alone."""
    session, other = contract.finish(started(make())), started(make(), seed=5)
    save_delta(tmp_path / "delta", session.states, {})
    load_delta(tmp_path / "delta", other.states)
    assert torch.equal(contract.logits(session.tuned), contract.logits(other.tuned))
    assert torch.equal(bank_of(session).structured, bank_of(other).structured)
    assert len(bank_of(other).values) == bank_of(other).active == bank_of(session).active
    size = sum(
        t.numel() * t.element_size() for k, t in tensors_to_store(session.states).items() if "bank" in k
    )
    assert size <= 6 * bank_of(session).active + 300


def test_branches_of_another_rank_are_refused(tmp_path: Path) -> None:
    session, other = started(BOTH), started(replace(BOTH, rank=2))
    save_delta(tmp_path / "delta", session.states, {})
    with pytest.raises(ConfigError, match=r"Set method\.rank to that of the run"):
        load_delta(tmp_path / "delta", other.states)


def test_a_frozen_site_freezes_its_branch() -> None:
    """Selectors freeze the slice of a site, and its factors lie in that slice."""
    session = started(BOTH)
    bank = bank_of(session)
    rest = bank.structured.tolist().index(True)
    bank.frozen[rest] = True
    (batch,) = batches(session, 1)
    nn.functional.cross_entropy(
        session.model(pixel_values=batch.inputs["pixel_values"]).logits, batch.labels
    ).backward()
    assert bank.values.grad is not None
    for i, (a, b) in enumerate(zip(bank.bounds(), bank.bounds()[1:], strict=False)):
        assert bank.values.grad[a:b].any() == (i != rest and b > a)


@pytest.mark.parametrize("make", [lambda: BOTH, lambda: replace(BOTH, class_token=False)])
def test_resumes_to_the_bit(make: Callable[[], SPT]) -> None:
    contract.check_resume(contract.Trial(make))


def test_class_token_is_trained_outside_the_budget() -> None:
    model: Any = contract.finish(started(BOTH)).model
    assert not torch.equal(model.vit.embeddings.cls_token, contract.tiny().vit.embeddings.cls_token)
    assert "class_token" not in started(replace(BOTH, class_token=False)).states["method"]


def test_capacity_is_at_most_what_can_be_trained() -> None:
    sizes = [layer.original.shape for layer in patched(started(BOTH).model).values()]
    assert len(bank_of(started(replace(BOTH, sparsity=0.0))).values) == sum(4 * sum(shape) for shape in sizes)
    # A branch would be larger than its matrix, so no matrix gets one.
    whole = started(replace(BOTH, sparsity=0.0, rank=32, alpha=1.0))
    assert bank_of(whole).active == len(bank_of(whole).values) == sum(shape.numel() for shape in sizes)
    assert all(isinstance(view, MixedDelta) and not view.additive for view in whole.states["method"]["views"])


def test_branches_are_no_sparse_change_that_could_be_added_to_another() -> None:
    sparse, mixed = (started(replace(BOTH, class_token=False, sparsity=s)) for s in (0.999, 0.9))
    setup: Any = SimpleNamespace(config=SimpleNamespace(method=BOTH), session=contract.finish(sparse))
    changes = sparse_changes(setup)
    assert sum(len(c.values) for c in changes.values()) == bank_of(sparse).active
    setup.session = mixed
    with pytest.raises(ConfigError, match="it stores a low-rank branch"):
        sparse_changes(setup)
