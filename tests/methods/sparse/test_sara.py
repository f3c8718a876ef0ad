"""Test SaRA against the paper's form: entries below the threshold as a leaf vector under torch's AdamW."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.core.attach import patched
from finetune.core.sparse.bank import Bank
from finetune.data.encode import collate
from finetune.errors import ConfigError
from finetune.methods.sparse import sara
from finetune.methods.sparse.sara import SaRA, nuclear_norm
from finetune.optim.adamw import AdamW
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.narrow import Narrow
from finetune.schedules.static import Static
from finetune.testing import contract, sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.training.session import Session, rate

CASES = [Case("sara", lambda: SaRA(sparsity=0.9), ("vit", "gpt2"), data_dependent=True)]

PUBLISHED = Published(
    "arXiv 2409.06633: narrowing at half of the run to 15 to 20 % of the entries, penalty of the text",
    {
        "score": "magnitude",
        "direction": "smallest",
        "scope": "model",
        "schedule": Narrow(at=0.5, keep=0.2, dropped="kept"),
        "decay": "zero",
        "penalty": 5e-3,
        "threshold": 2e-3,
    },
    {"threshold": (None, "a threshold fits one model; the share of the entries fits all")},
)

test_contract = contract_test(CASES)

THETA = 8e-3
SETTINGS = AdamW(lr=2e-3, weight_decay=0.5)
UNCLIPPED = replace(contract.TRAIN, clip=None)
LAYER = "vit.layers.0.mlp.fc1"
NARROWED = contract.STEPS // 2


@pytest.fixture(autouse=True)
def small_matrices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sara, "LARGEST_UNPENALIZED", 8)
    monkeypatch.setattr(sessions, "OPTIMIZER", SETTINGS)


def started(method: SaRA, seed: int = 0, double: bool = False) -> Session:
    model = contract.tiny().double() if double else None
    session = contract.begin(method, train=UNCLIPPED, seed=seed, model=model)
    if double:
        session.states.double()
    session.start()
    return session


def bank_of(session: Session) -> Bank:
    bank: Bank = session.states["method"]["bank"]
    return bank


def weights(session: Session) -> list[Tensor]:
    """Return all adapted weights as they are now, one vector a site."""
    return [layer.weight.reshape(-1).clone() for layer in patched(session.model).values()]


def originals(session: Session) -> list[Tensor]:
    return [layer.original.reshape(-1) for layer in patched(session.model).values()]


def places(session: Session) -> list[Tensor]:
    return [bank_of(session).positions(i).long().clone() for i in range(len(bank_of(session).sizes))]


def test_trained_are_exactly_those_below_the_threshold_and_adam_keeps_two_numbers_each() -> None:
    session = started(SaRA(threshold=THETA))
    next(session.steps())
    count = 0
    for place, w in zip(places(session), originals(session), strict=True):
        assert torch.equal(place, (w.abs() < THETA).nonzero().view(-1))
        assert 0 < len(place) < len(w)
        count += len(place)
    bank = bank_of(session)
    assert len(bank.values) == count
    moments = [t for t in session.optimizer.state[bank.values].values() if t.numel() > 1]
    assert [t.numel() for t in moments] == [count, count]


def test_a_weight_that_equals_the_threshold_is_not_trained() -> None:
    magnitudes = torch.cat(originals(contract.begin(SaRA(threshold=THETA)))).abs()
    equal = float(magnitudes[magnitudes >= THETA].min())
    bank = bank_of(contract.begin(SaRA(threshold=equal)))
    assert len(bank.values) == int((magnitudes < THETA).sum())


def test_sparsity_trains_the_k_smallest_of_the_model_and_remembers_their_threshold() -> None:
    session = started(SaRA(sparsity=0.9))
    every = torch.cat([w.abs() for w in originals(session)])
    k = len(every) - round(0.9 * len(every))
    below = every.sort().values[k - 1]
    chosen = torch.cat([w[p].abs() for w, p in zip(originals(session), places(session), strict=True)])
    assert len(chosen) == k == len(bank_of(session).values)
    assert chosen.max() == below == session.states["method"].theta


@pytest.mark.parametrize("method", [SaRA(threshold=THETA), SaRA(sparsity=0.7)])
def test_narrowing_leaves_those_that_are_still_below_the_threshold(method: SaRA) -> None:
    """Entries that leave keep their value, and survivors keep their moments, to the bit."""
    session = started(method)
    theta, first = session.states["method"].theta, places(session)
    for step in session.steps():
        if step.number == NARROWED:
            state = session.optimizer.state[bank_of(session).values]
            moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
            before, starts = weights(session), bank_of(session).bounds()
            expected = [p[w[p].abs() < theta] for p, w in zip(first, before, strict=True)]
            kept = torch.cat(
                [
                    torch.isin(p, e).nonzero().view(-1) + a
                    for p, e, a in zip(first, expected, starts, strict=False)
                ]
            )
            assert 0 < len(kept) < starts[-1]
            session.run.step = NARROWED
            session.current.before_step(session.run, session.states["method"])
            assert all(torch.equal(state[name][: len(kept)], moments[name][kept]) for name in moments)
            assert all(torch.equal(a, b) for a, b in zip(weights(session), before, strict=True))
    for place, known, now, then in zip(places(session), expected, weights(session), before, strict=True):
        assert torch.equal(place, known)
        rests = torch.ones(len(now), dtype=torch.bool).index_fill_(0, known, False)
        assert torch.equal(now[rests], then[rests])
        assert not torch.equal(now, then)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_entries_above_the_threshold_keep_their_bits(penalty: float) -> None:
    """The penalty changes the trained entries and no others."""
    session = started(SaRA(threshold=THETA, penalty=penalty))
    base, first = [w.clone() for w in originals(session)], places(session)
    contract.finish(session)
    for w, now, place in zip(base, weights(session), first, strict=True):
        assert set((w != now).nonzero().view(-1).tolist()) <= set(place.tolist())
    other = contract.finish(started(SaRA(threshold=THETA, penalty=0.05)))
    assert any(not torch.equal(a, b) for a, b in zip(weights(session), weights(other), strict=True))


def test_the_whole_run_equals_adamw_on_a_leaf_vector() -> None:
    """The run has decay to 0, the penalty and the narrowing; the other entries keep their bits.

    The gradient of the vector is gathered from the dense one.
    """
    session = started(SaRA(threshold=THETA, targets=(LAYER,), penalty=0.05), double=True)
    model = contract.tiny().double()
    weight = model.get_submodule(LAYER).weight.detach()
    where = (weight.view(-1).float().abs() < THETA).nonzero().view(-1)
    vector, frozen = (
        weight.view(-1)[where].clone().requires_grad_(),
        torch.zeros(len(where), dtype=torch.bool),
    )
    head = [p.detach().clone().requires_grad_() for p in model.classifier.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [vector, head[0]], "weight_decay": 0.5}, {"params": [head[1]], "weight_decay": 0.0}]
    )
    for number, micro in enumerate(session.batches.steps(0, contract.STEPS)):
        if number == NARROWED:
            frozen = vector.detach().float().abs() >= THETA
            assert 0 < int(frozen.sum()) < len(frozen)
        now = weight.view(-1).index_put((where,), vector).view_as(weight)
        batch = collate([contract.examples()[int(i)] for i in micro[0].ids])  # type: ignore[union-attr]
        swapped = {f"{LAYER}.weight": now, "classifier.weight": head[0], "classifier.bias": head[1]}
        logits = functional_call(
            model, swapped, kwargs={"pixel_values": batch.inputs["pixel_values"].double()}
        ).logits
        alive = (
            torch.zeros(weight.numel(), dtype=torch.float64)
            .index_fill(0, where[~frozen], 1.0)
            .view_as(weight)
        )
        penalty = torch.linalg.matrix_norm(now * alive, "nuc")
        optimizer.zero_grad()
        (nn.functional.cross_entropy(logits, batch.labels) + 0.05 * penalty).backward()
        assert vector.grad is not None
        vector.grad[frozen] = 0
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr * rate(SETTINGS, number, contract.STEPS)
        before = vector.detach().clone()
        optimizer.step()
        with torch.no_grad():
            vector[frozen] = before[frozen]
    contract.finish(session)
    layer = patched(session.model)[LAYER]
    expected = weight.view(-1).index_put((where,), vector.detach()).view_as(weight)
    torch.testing.assert_close(layer.weight, expected, atol=1e-7, rtol=0)
    assert float((expected - weight).abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)])
def test_nuclear_norm_and_its_gradient_are_those_of_the_singular_value_decomposition(
    shape: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    where = (
        torch.randperm(shape[0] * shape[1], generator=generator)[: shape[0] * shape[1] // 2 + 5].sort().values
    )
    values = torch.randn(len(where), generator=generator, dtype=torch.float64, requires_grad=True)
    ours = nuclear_norm(values, where, torch.Size(shape))
    dense = torch.zeros(shape[0] * shape[1], dtype=torch.float64).index_put((where,), values).view(shape)
    theirs = torch.linalg.matrix_norm(dense, "nuc")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, values)[0], torch.autograd.grad(theirs, values)[0], atol=1e-6, rtol=1e-6
    )


def test_nuclear_norm_of_a_matrix_of_low_rank_has_no_slope_in_its_null_space() -> None:
    u, v = torch.randn(6, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    values = (u @ v.T).view(-1).requires_grad_()
    slope = torch.autograd.grad(nuclear_norm(values, torch.arange(24), torch.Size((6, 4))), values)[0]
    torch.testing.assert_close(slope.view(6, 4), u @ v.T / (u.norm() * v.norm()))
    empty = torch.zeros(3, requires_grad=True)
    assert not nuclear_norm(empty, torch.arange(3), torch.Size((6, 4))).any()


def test_the_penalty_takes_one_matrix_a_step_and_reaches_its_values_alone() -> None:
    """Compare with the paper's formula on one site. The matrix depends on seed and step alone, not on other
    draws."""
    session = started(SaRA(threshold=THETA, penalty=0.3))
    bank, method, hit = bank_of(session), session.current, list[int]()
    for step in range(12):
        session.run.step = step
        loss = method.loss(session.run, session.states["method"], None)
        assert isinstance(loss, Tensor)
        bank.values.grad = None
        loss.backward()
        grad, bounds = bank.values.grad, bank.bounds()
        assert grad is not None
        (i,) = [i for i in range(len(bank.sizes)) if grad[bounds[i] : bounds[i + 1]].any()]
        hit.append(i)
        layer = list(patched(session.model).values())[i]
        dense = torch.zeros(layer.original.numel()).index_copy(
            0, places(session)[i], originals(session)[i][places(session)[i]]
        )
        torch.testing.assert_close(
            loss, 0.3 * torch.linalg.matrix_norm(dense.view(layer.original.shape), "nuc")
        )
        torch.rand(3, generator=session.run.generator)
        assert torch.equal(method.loss(session.run, session.states["method"], None), loss)
    assert len(set(hit)) > 4
    session.model.eval()
    assert SaRA(penalty=0.0).loss(session.run, session.states["method"], None) == 0.0


def test_small_matrices_are_not_penalized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sara, "LARGEST_UNPENALIZED", 32)
    session = started(SaRA())
    assert session.current.loss(session.run, session.states["method"], None) == 0.0


def test_above_all_weights_it_is_adamw_on_everything() -> None:
    session = started(SaRA(threshold=1e9, schedule=Static(), penalty=0.0), double=True)
    bare = contract.tiny().double().requires_grad_(False).train()
    matrices = [bare.get_submodule(name).weight.requires_grad_() for name in patched(session.model)]
    head = [p.requires_grad_() for p in bare.classifier.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [*matrices, head[0]], "weight_decay": 0.5}, {"params": [head[1]], "weight_decay": 0.0}]
    )
    for number, micro in enumerate(session.batches.steps(0, contract.STEPS)):
        batch = collate([contract.examples()[int(i)] for i in micro[0].ids])  # type: ignore[union-attr]
        optimizer.zero_grad()
        nn.functional.cross_entropy(bare(**batch.inputs).logits, batch.labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr * rate(SETTINGS, number, contract.STEPS)
        optimizer.step()
    contract.finish(session)
    for weight, layer in zip(matrices, patched(session.model).values(), strict=True):
        torch.testing.assert_close(layer.weight, weight.detach(), atol=1e-9, rtol=0)


def test_resumes_to_the_bit_on_both_sides_of_the_narrowing() -> None:
    contract.check_resume(contract.Trial(lambda: SaRA(threshold=THETA, penalty=0.1)))


def test_a_base_in_another_dtype_has_its_own_entries_and_is_rejected() -> None:
    session = started(SaRA(threshold=THETA))
    half = contract.begin(
        SaRA(threshold=THETA), train=replace(UNCLIPPED, precision="bf16"), model=contract.tiny().bfloat16()
    )
    assert len(bank_of(half).values) == sum(
        int((w.bfloat16().float().abs() < THETA).sum()) for w in originals(session)
    )
    assert len(bank_of(half).values) != len(bank_of(session).values)
    with pytest.raises(RuntimeError, match="size mismatch"):
        half.states.load_state_dict(session.states.state_dict())


def test_other_schedules_behave_as_in_the_engine() -> None:
    session = contract.finish(started(SaRA(sparsity=0.9, schedule=DropGrow(every=2))))
    assert bank_of(session).active == len(bank_of(session).values)
    assert not len(bank_of(session).settled_values)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"threshold": 1e-3, "sparsity": 0.5}, r"method\.threshold=0\.001 says how many .* sparsity=0\.5"),
        (
            {"threshold": 1e-3, "schedule": DropGrow()},
            r"schedule=drop_grow has no effect; take schedule=narrow",
        ),
        ({"schedule": Narrow(keep=0.5)}, r"schedule\.keep=0\.5 has no effect"),
        ({"direction": "largest"}, r"method\.direction=largest: .* take method=sparse"),
        ({"grain": "row"}, r"method\.grain=row"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        SaRA(**settings)  # type: ignore[arg-type]


def test_a_threshold_below_all_weights_is_refused_and_so_is_a_narrowing_outside_the_run() -> None:
    with pytest.raises(ConfigError, match=r"method\.threshold=1e-20: no weight is below it"):
        SaRA(threshold=1e-20).build(contract.tiny())
    assert "schedule.at" in SaRA().faults(1)[0]
    assert not SaRA().faults(6)
