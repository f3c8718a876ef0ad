"""Test the sparse engine: counts, decay, schedules, refusals.

The oracles are plain models with masked gradients, torch's AdamW, and sorts of all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.core.attach import patched
from finetune.core.site import Site, find_sites
from finetune.core.sparse.bank import Bank
from finetune.core.sparse.budgets import Budget
from finetune.core.sparse.grain import make_grain
from finetune.core.sparse.schedule import Schedule
from finetune.core.sparse.settings import Direction, Scope
from finetune.methods.sparse.sparse import Crossing
from finetune.optim.adamw import AdamW
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.grow import Grow
from finetune.schedules.narrow import Narrow
from finetune.schedules.one_shot import OneShot
from finetune.schedules.ramp import Ramp
from finetune.schedules.redraw import Redraw
from finetune.testing import contract, sessions
from finetune.training.session import Session, rate

DECAYING = AdamW(lr=1e-2, weight_decay=0.3)


def double(session: Session) -> Session:
    """Make the session float64, so that rounding hides no difference."""
    session.model.double()
    session.states.double()
    session.compute.on_device = lambda inputs: {k: v.double() for k, v in inputs.items()}  # type: ignore
    return session


def begin(method: Crossing, steps: int = contract.STEPS) -> Session:
    """Start a session in float64 and make its first choice."""
    session = double(contract.begin(method, train=replace(contract.TRAIN, steps=steps)))
    session.start()
    return session


def bank_of(session: Session) -> Bank:
    bank: Bank = session.states["method"]["bank"]
    return bank


def chosen(session: Session) -> list[set[int]]:
    bank = bank_of(session)
    return [set(bank.positions(i).tolist()) for i in range(len(bank.sizes))]


def count(sets: list[set[int]]) -> int:
    return sum(map(len, sets))


def weights(session: Session) -> list[Tensor]:
    return [layer.weight.clone() for layer in patched(session.model).values()]


def originals(session: Session) -> list[Tensor]:
    return [layer.original.clone() for layer in patched(session.model).values()]


def best(
    scores: list[Tensor], groups: list[list[int]], counts: list[int], allowed: list[set[int]] | None = None
) -> list[set[int]]:
    """Return the best entries of each group, among the allowed ones, by one stable sort."""
    found: list[set[int]] = [set() for _ in scores]
    for members, k in zip(groups, counts, strict=True):
        units = [
            (-s, i, at)
            for i in members
            for at, s in enumerate(scores[i].reshape(-1).float().tolist())
            if allowed is None or at in allowed[i]
        ]
        for _, i, at in sorted(units)[:k]:
            found[i].add(at)
    return found


def plain(session: Session) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a model of plain layers with the current weights, and its adapted weights."""
    model = contract.tiny().double().requires_grad_(False)
    model.classifier.load_state_dict(session.model.classifier.state_dict())
    found = []
    for name, layer in patched(session.model).items():
        found.append(model.get_submodule(name).weight.copy_(layer.weight).requires_grad_())
    return model, found


# Training


def reference(session: Session, masks: list[Tensor], decay: str) -> Iterator[list[Tensor]]:
    """Repeat the run on plain layers: masked gradients, AdamW, and decay of the masked entries only."""
    model, parameters = plain(session)
    first = [p.detach().clone() for p in parameters]
    head = model.classifier.requires_grad_()
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], weight_decay=0.0)
    for step, micro in enumerate(session.batches.steps(0, session.recipe.train.steps)):
        lr = DECAYING.lr * rate(DECAYING, step, session.recipe.train.steps)
        (batch,) = micro
        assert batch is not None
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(**session.compute.on_device(batch.inputs)).logits, batch.labels
        ).backward()
        for p, mask in zip(parameters, masks, strict=True):
            assert p.grad is not None
            p.grad.mul_(mask)
        nn.utils.clip_grad_norm_([*parameters, *head.parameters()], 1.0)
        with torch.no_grad():
            for p, mask, start in zip(parameters, masks, first, strict=True):
                p.sub_(mask * (p if decay == "zero" else p - start), alpha=lr * DECAYING.weight_decay)
            head.weight.mul_(1 - lr * DECAYING.weight_decay)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        yield [p.detach() for p in parameters]


@pytest.mark.parametrize("decay", ["base", "zero"])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_training_is_that_of_masked_weights(
    sparsity: float, decay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "OPTIMIZER", DECAYING)
    session = begin(Crossing(sparsity=sparsity, decay=decay))
    masks = [
        torch.zeros(w.numel()).index_fill(0, torch.tensor(sorted(s)), 1.0).view_as(w)
        for w, s in zip(weights(session), chosen(session), strict=True)
    ]
    assert all(m.all() for m in masks) == (sparsity == 0)
    for expected, _ in zip(reference(session, masks, decay), session.steps(), strict=True):
        for ours, theirs in zip(weights(session), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_dense_limit_is_full_fine_tuning(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with torch's AdamW, decay included, on the weights of the plain model, in float32."""
    settings = replace(DECAYING, weight_decay=decay)
    monkeypatch.setattr(sessions, "OPTIMIZER", settings)
    session = contract.begin(Crossing(sparsity=0.0, decay="zero"), train=replace(contract.TRAIN, clip=None))
    session.start()
    model = contract.tiny().requires_grad_(False)
    parameters = [model.get_submodule(n).weight.requires_grad_() for n in patched(session.model)]
    head = [p.requires_grad_() for p in model.classifier.parameters()]
    groups = [
        {"params": [*parameters, head[0]], "weight_decay": decay},
        {"params": head[1:], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    for step, micro in zip(session.steps(), session.batches.steps(0, contract.STEPS), strict=True):
        (batch,) = micro
        assert batch is not None
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = step.lr
        optimizer.step()
        assert abs(step.loss - float(loss.detach())) < 1e-4
        close = [
            float((a - b.detach()).abs().max()) for a, b in zip(weights(session), parameters, strict=True)
        ]
        assert max(close) < 2e-4, "a step is 1e-2"


# What is chosen

GROUPS: dict[Scope, Callable[[Site], Any]] = {
    "matrix": lambda s: s.name,
    "role": lambda s: s.role,
    "block": lambda s: s.block,
    "model": lambda s: 0,
}


@pytest.mark.parametrize(("direction", "sparsity"), [("largest", 0.97), ("smallest", 0.5)])
@pytest.mark.parametrize("scope", GROUPS)
def test_exactly_k_the_best_of_each_scope(scope: Scope, direction: Direction, sparsity: float) -> None:
    session = begin(Crossing(sparsity=sparsity, score="magnitude", scope=scope, direction=direction))
    sites = find_sites(session.model, ("all",))
    groups: dict[Any, list[int]] = {}
    for i, site in enumerate(sites):
        groups.setdefault(GROUPS[scope](site), []).append(i)
    assert len(groups) == {"matrix": 12, "role": 6, "block": 2, "model": 1}[scope]
    sizes = [sum(sites[i].size for i in members) for members in groups.values()]
    counts = [size - round(sparsity * size) for size in sizes]
    sign = 1 if direction == "largest" else -1
    expected = best([sign * w.abs() for w in originals(session)], list(groups.values()), counts)
    assert chosen(session) == expected
    assert bank_of(session).active == sum(counts) == len(bank_of(session).values)


@pytest.mark.parametrize(
    ("sizes", "sparsity", "expected"),
    [((100, 10), 0.9, 100), ((100, 10), 0.99, 10), ((3, 1), 0.99, 1), ((10, 10), 0.0, 100)],
)
def test_the_count_is_rounded_and_never_zero(sizes: tuple[int, int], sparsity: float, expected: int) -> None:
    model = nn.Sequential(nn.Linear(sizes[1], sizes[0]))
    method = Crossing(sparsity=sparsity)
    (site,) = sites = find_sites(model, ("all",))
    # int(1000 * (1 - 0.9)) would be 99
    assert method.budgets(sites, [make_grain("element", site, model)]) == [Budget([0], expected)]


def layer_shares(session: Session, sparsity: float) -> list[float]:
    """Divide K in proportion to the sums of the scores, which are size times mean."""
    sums = [float(w.abs().sum()) for w in originals(session)]
    total = sum(w.numel() for w in originals(session))
    return [s / sum(sums) * (total - round(sparsity * total)) for s in sums]


def test_a_budget_for_each_layer_by_its_mean_score() -> None:
    model = contract.tiny()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight.mul_(3)
    session = contract.begin(Crossing(sparsity=0.9, score="magnitude", scope="layer"), model=model)
    session.start()
    found = [len(s) for s in chosen(session)]
    assert sum(found) == bank_of(session).active == len(bank_of(session).values)
    assert all(abs(n - share) < 1 for n, share in zip(found, layer_shares(session, 0.9), strict=True))
    assert chosen(session) == best([w.abs() for w in originals(session)], [[i] for i in range(12)], found)


@pytest.mark.parametrize(("grain", "sparsity"), [("2:4", 0.5), ("1:8", 0.875), ("2:3", 0.333333)])
def test_n_of_m_in_every_row(grain: str, sparsity: float) -> None:
    """2:3 has a sparsity that can only be written approximately."""
    targets = ("down",) if grain == "2:3" else ("all",)
    session = begin(Crossing(sparsity=sparsity, grain=grain, score="magnitude", targets=targets))
    n, m = map(int, grain.split(":"))
    for found, w in zip(chosen(session), originals(session), strict=True):
        mask = (
            torch.zeros(w.numel(), dtype=torch.bool)
            .index_fill_(0, torch.tensor(sorted(found)), True)
            .view(-1, m)
        )
        assert (mask.sum(1) == n).all()
        groups = w.abs().view(-1, m)
        assert (groups.masked_fill(~mask, 9).min(1).values >= groups.masked_fill(mask, 0).max(1).values).all()


@pytest.mark.parametrize(
    ("grain", "units"), [("row", 32), ("column", 1), ("block:4", 16), ("head", 16 * 32), ("matrix", 1024)]
)
def test_whole_units_with_the_largest_mean_score(grain: str, units: int) -> None:
    session = begin(Crossing(sparsity=0.7, grain=grain, score="magnitude", scope="model", targets=("q", "v")))
    size = 32 if grain == "column" else units
    sites = find_sites(session.model, ("q", "v"))
    means = []
    for w, site in zip(originals(session), sites, strict=True):
        g = make_grain(grain, site, session.model)
        means.append(w.abs().unflatten(0, (-1, g.height)).unflatten(2, (-1, g.width)).mean((1, 3)).view(-1))
    k = max(round((4096 - round(0.7 * 4096)) / size), 1)
    assert bank_of(session).active == k * size == len(bank_of(session).values)
    expected = best(means, [[0, 1, 2, 3]], [k])
    for i, (site, found) in enumerate(zip(sites, chosen(session), strict=True)):
        g = make_grain(grain, site, session.model)
        held = g.members(torch.tensor(sorted(found), dtype=torch.int64)).nonzero().view(-1)
        assert set(held.tolist()) == expected[i]
        assert len(found) == len(held) * size


# Schedules


def gradient(session: Session) -> list[Tensor]:
    """Return |g| of the merged weights on the batch of the next step, by autograd."""
    model, parameters = plain(session)
    ((batch,),) = session._upcoming(1)
    assert batch is not None
    loss = nn.functional.cross_entropy(model(**session.compute.on_device(batch.inputs)).logits, batch.labels)
    return [g.abs() for g in torch.autograd.grad(loss, parameters)]


def changes(session: Session) -> dict[tuple[int, int], float]:
    """Return the value of each trained entry, in the order of the slots."""
    bank = bank_of(session)
    places = [(i, at) for i in range(len(bank.sizes)) for at in bank.positions(i).tolist()]
    return dict(zip(places, bank.values[: bank.active].tolist(), strict=True))


def until(session: Session, steps: int) -> Session:
    """Run the session for ``steps`` steps."""
    next(step for step in session.steps() if step.number == steps)
    return session


def move(session: Session) -> dict[str, float]:
    """Make the move that is due, without the step after it; return what is logged."""
    session.run.step, session.run.metrics = session.number, {}
    session.current.before_step(session.run, session.states["method"])
    return session.run.metrics


@pytest.mark.parametrize(
    ("initial", "power", "scope"),
    [(5.0, 3.0, "model"), (4.0, 1.0, "matrix"), (0.2, 3.0, "matrix"), (0.0, 1.0, "model")],
)
def test_ramp_follows_its_curve(initial: float, power: float, scope: Scope) -> None:
    """Compare with equation 1 of arXiv 1710.01878: s_t = s_f + (s_i - s_f) (1 - t / (n every))^power."""
    steps, every = 10, 2
    schedule = Ramp(initial=initial, power=power, start=0.0, end=0.6, every=every)
    session = contract.begin(
        Crossing(sparsity=0.9, score="magnitude", scope=scope, schedule=schedule),
        train=replace(contract.TRAIN, steps=steps),
    )
    sizes = [sum(bank_of(session).sizes)] if scope == "model" else bank_of(session).sizes
    last = None
    for step in session.steps():
        t, n = (step.number - 1) // every * every, round(0.6 * steps) // every
        wanted = 0
        for size in sizes:
            k = size - round(0.9 * size)
            s_f, s_i = 1 - k / size, 1 - initial * k / size
            s_t = s_f + (s_i - s_f) * (1 - min(t / (n * every), 1)) ** power
            wanted += max(round((1 - s_t) * size - 1e-9), 1)
        now = chosen(session)
        assert abs(count(now) - wanted) <= len(sizes)
        assert last is None or all(a >= b if initial > 1 else a <= b for a, b in zip(last, now, strict=True))
        last = now
    assert count(chosen(session)) == sum(size - round(0.9 * size) for size in sizes)


def test_ramp_gives_up_the_worst_by_score() -> None:
    session = until(
        begin(
            Crossing(
                sparsity=0.9, score="gradient", scope="model", schedule=Ramp(initial=4.0, every=2, end=0.7)
            )
        ),
        2,
    )
    before, g = chosen(session), gradient(session)
    move(session)
    assert count(chosen(session)) < count(before)
    assert chosen(session) == best(g, [list(range(12))], [count(chosen(session))], before)


def test_grow_adds_its_parts_and_nothing_leaves() -> None:
    session = begin(Crossing(sparsity=0.9, score="gradient", scope="model", schedule=Grow()))
    k = len(bank_of(session).values)
    assert count(chosen(session)) == round(k / contract.STEPS)
    for step in session.steps():
        if step.number == contract.STEPS:
            break
        before, values, g = chosen(session), changes(session), gradient(session)
        move(session)
        after, now = chosen(session), changes(session)
        assert count(after) == round(k * (step.number + 1) / contract.STEPS)
        untrained = [set(range(w.numel())) - b for w, b in zip(g, before, strict=True)]
        grown = best(g, [list(range(12))], [count(after) - count(before)], untrained)
        assert after == [b | new for b, new in zip(before, grown, strict=True)]
        assert all(now[e] == values.get(e, 0.0) for e in now)
    assert count(chosen(session)) == k


def test_narrow_keeps_a_subset_and_the_others_keep_their_change() -> None:
    session = until(
        begin(Crossing(sparsity=0.8, score="gradient", scope="model", schedule=Narrow(at=0.5, keep=0.25))), 3
    )
    k, before, then, g = len(bank_of(session).values), chosen(session), weights(session), gradient(session)
    for _ in session.steps():
        pass
    after = chosen(session)
    assert count(after) == round(0.25 * k)
    assert after == best(g, [list(range(12))], [count(after)], before)
    for now, old, b, a in zip(weights(session), then, before, after, strict=True):
        left = torch.tensor(sorted(b - a), dtype=torch.int64)
        assert torch.equal(now.view(-1)[left], old.view(-1)[left])


@pytest.mark.parametrize("scope", ["model", "matrix", "layer"])
@pytest.mark.parametrize("dropped", ["base", "kept"])
def test_drop_grow(scope: Scope, dropped: Any) -> None:
    """The smallest changes leave and the largest gradients come in.

    Survivors keep value and moments; entries that left are as the schedule says.
    """
    schedule = DropGrow(every=3, rate=0.4, decay="linear", dropped=dropped)
    session = until(begin(Crossing(sparsity=0.9, score="gradient", scope=scope, schedule=schedule)), 3)
    groups = [list(range(12))] if scope == "model" else [[i] for i in range(12)]
    before, values, then, g = chosen(session), changes(session), weights(session), gradient(session)
    counts = [sum(len(before[i]) for i in members) for members in groups]
    dense = [torch.zeros_like(w) for w in g]
    for (i, at), v in values.items():
        dense[i].view(-1)[at] = abs(v)
    kept = best(dense, groups, [n - round(0.2 * n) for n in counts], before)
    open_ = [set(range(w.numel())) - k for w, k in zip(g, kept, strict=True)]
    grown = best(g, groups, [round(0.2 * n) for n in counts], open_)
    state = session.optimizer.state[bank_of(session).values]
    moments = {
        name: dict(zip(values, state[name].tolist(), strict=True)) for name in ("exp_avg", "exp_avg_sq")
    }
    metrics = move(session)
    after = chosen(session)
    gone, fresh = ([a - b for a, b in zip(*pair, strict=True)] for pair in ((before, after), (after, before)))
    assert after == [k | new for k, new in zip(kept, grown, strict=True)]
    assert count(after) == count(before)
    assert count(gone) > 0.1 * count(before)
    assert metrics["churn"] == pytest.approx(count(fresh) / count(after))
    assert changes(session) == {e: values.get(e, 0.0) for e in changes(session)}
    for name, old in moments.items():
        assert state[name].tolist() == [old.get(e, 0.0) for e in changes(session)]
    for now, was, base, left in zip(weights(session), then, originals(session), gone, strict=True):
        places = torch.tensor(sorted(left), dtype=torch.int64)
        expected = was.clone()
        if dropped == "base":
            expected.view(-1)[places] = base.view(-1)[places]
        assert torch.equal(now, expected)


def test_redraw_chooses_all_anew() -> None:
    session = until(begin(Crossing(sparsity=0.9, score="gradient", schedule=Redraw(every=2))), 2)
    before, then, g = chosen(session), weights(session), gradient(session)
    move(session)
    assert chosen(session) == best(
        g, [[i] for i in range(12)], [size - round(0.9 * size) for size in bank_of(session).sizes]
    )
    assert chosen(session) != before
    assert all(torch.equal(a, b) for a, b in zip(weights(session), then, strict=True)), (
        "by default what leaves keeps its change"
    )


@pytest.mark.parametrize(("scope", "grain"), [("layer", "element"), ("role", "row")])
@pytest.mark.parametrize(
    "schedule",
    [Ramp(initial=4.0, every=1, end=0.5), Narrow(keep=0.5), Grow(), DropGrow(every=2)],
    ids=lambda s: s.name,
)
def test_the_count_is_met_after_every_move(schedule: Schedule, grain: str, scope: Scope) -> None:
    """Units are whole: with rows of two widths, at most one unit is missing a group and move."""
    session = contract.begin(
        Crossing(sparsity=0.8, score="gradient", scope=scope, grain=grain, schedule=schedule)
    )
    sites = find_sites(session.model, ("all",))
    total = sum(s.size for s in sites)
    for step in session.steps():
        density = schedule.initial_density(contract.STEPS)
        for s in range(1, step.number):
            move = schedule.move(s, contract.STEPS)
            density = move.density if move else density
        wanted = density * (total - round(0.8 * total))
        missing = wanted - bank_of(session).active
        groups = 1 if scope == "layer" else 6
        assert abs(missing) <= (groups if grain == "element" else 12 * 48)


def test_one_shot_rewinds_everything_and_takes_the_largest_changes() -> None:
    session = contract.begin(
        Crossing(sparsity=0.9, score="change", scope="model", schedule=OneShot(dense=0.5))
    )
    for step in session.steps():
        if step.number == 3:
            break
    base, previous = contract.tiny(), session.states["method"]
    names = [s.name for s in find_sites(session.model, ("all",))]
    trained = [session.model.get_submodule(n).weight.detach().clone() for n in names]
    changes = [(w - base.get_submodule(n).weight).abs() for w, n in zip(trained, names, strict=True)]
    assert all((c > 0).any() for c in changes)
    assert not torch.equal(session.model.classifier.weight, base.classifier.weight)
    session.enter(1)
    session.start(previous)
    k = sum(c.numel() for c in changes) - round(0.9 * sum(c.numel() for c in changes))
    assert chosen(session) == best(changes, [list(range(12))], [k])
    contract.same_values(base.classifier, session.model.classifier)
    assert torch.equal(contract.logits(session.tuned), contract.logits(base))
    assert not session.optimizer.state


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"score": "random", "rank": 8},
            "method.rank=8 .* score=random; it belongs to lowrank_magnitude, off_principal, principal",
        ),
        ({"score": "snip", "power": 2.0}, "method.power=2.0 .* score=snip; it belongs to d3"),
        (
            {"score": "magnitude", "batches": 2},
            "method.batches=2 .* score=magnitude; it belongs to d3, fisher, gradient,",
        ),
        ({"grain": "rows"}, "method.grain=rows is not a grain. Take element, row"),
        ({"grain": "block:0"}, "method.grain=block:0 is not a grain\\. .*block:16"),
        ({"grain": "4:2"}, "method.grain=4:2 .* n below m, as in 2:4"),
        ({"grain": "2:4", "sparsity": 0.9}, "method.grain=2:4 .* sparsity=0.9 must be 0.5"),
        (
            {"grain": "2:4", "sparsity": 0.5, "scope": "model"},
            "method.grain=2:4 .* scope=model .* scope=matrix",
        ),
        (
            {"grain": "2:4", "sparsity": 0.5, "schedule": Grow()},
            "method.grain=2:4 .* schedule=grow would change",
        ),
        ({"grain": "matrix"}, "method.grain=matrix .* scope=matrix .* scope=role, block or model"),
        ({"score": "change"}, "score=change is 0 for every entry .* schedule=static .* schedule=one_shot"),
        ({"score": "change", "schedule": Grow()}, "score=change .* schedule=grow .* schedule=one_shot"),
        ({"scope": "layer", "direction": "smallest"}, "scope=layer .* direction=smallest .* scope=matrix"),
        (
            {"scope": "layer", "score": "gradient_weight"},
            "scope=layer .* score=gradient_weight .* scope=matrix",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Crossing(**settings)


def test_all_contradictions_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"method.rank=8.*method.power=2.0.*method.grain=rows"):
        Crossing(rank=8, power=2.0, grain="rows")


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (DropGrow(every=6), "schedule.every=6 .* 6 steps.*take less"),
        (Redraw(every=200), "schedule.every=200 .* 6 steps.*take less"),
        (Grow(every=4, end=0.5), "schedule.every=4 .* schedule.end=0.5 .* take less"),
        (Ramp(every=5, end=0.5), "schedule.end=0.5 .* schedule.every=5; widen .* smaller period"),
        (Narrow(at=0.01), "schedule.at=0.01 .* 6 steps .* another share"),
        (OneShot(dense=0.99), "schedule.dense=0.99 .* 6 steps .* another share"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_a_fault(schedule: Schedule, words: str) -> None:
    import re

    (fault,) = Crossing(score="gradient", schedule=schedule).faults(contract.STEPS)
    assert re.search(words, fault)
    assert not Crossing(score="gradient", schedule=schedule).faults(1000)
