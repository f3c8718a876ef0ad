"""Test the choice of the best units piece by piece against one stable sort of all units in plain Python."""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.core.attach import patched
from finetune.core.sparse import select
from finetune.core.sparse.schedule import Schedule
from finetune.core.sparse.select import TopK, apportion, kth_largest, sort_keys
from finetune.core.sparse.settings import Scope
from finetune.methods.sparse.sparse import Crossing
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.redraw import Redraw
from finetune.testing import contract


def sort_everything(
    pieces: list[list[float]], allowed: list[list[bool]], costs: list[int], budget: int
) -> dict[int, list[int]]:
    """Take units from the best down until the next exceeds the budget.

    Ties go to the earlier piece, then to the lower position.
    """
    units = [
        (-s, p, i)
        for p, scores in enumerate(pieces)
        for i, s in enumerate(scores)
        if allowed[p][i] and costs[p] <= budget
    ]
    chosen: dict[int, list[int]] = {p: [] for p in range(len(pieces))}
    spent = 0
    for _, piece, i in sorted(units):  # -0.0 and 0.0 are equal to Python too
        spent += costs[piece]
        if spent > budget:
            break
        chosen[piece].append(i)
    return {p: sorted(found) for p, found in chosen.items()}


def stream(
    pieces: list[list[float]], allowed: list[list[bool]], costs: list[int], budget: int, order: list[int]
) -> dict[int, list[int]]:
    top = TopK(budget, dict(enumerate(costs)))
    for p in order:
        top.add(
            p,
            torch.tensor(pieces[p], dtype=torch.float32),
            None if all(allowed[p]) else torch.tensor(allowed[p]),
        )
    found = top.take()
    assert all(t.dtype == torch.int32 for t in found.values())
    return {p: t.tolist() for p, t in found.items()}


SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, 1e-45, -1e-45]),  # few values: many ties
    st.floats(width=32, allow_nan=False),
)


@st.composite
def problems(draw: Any, even: bool) -> Any:
    ties = draw(st.booleans())
    score = st.sampled_from([-1.0, 0.0, -0.0, 3.0]) if ties else SCORE
    pieces = draw(st.lists(st.lists(score, min_size=1, max_size=30), min_size=1, max_size=5))
    allowed = [[draw(st.booleans()) for _ in p] if draw(st.booleans()) else [True] * len(p) for p in pieces]
    costs = [draw(st.integers(1, 4))] * len(pieces) if even else [draw(st.integers(1, 9)) for _ in pieces]
    budget = draw(st.integers(0, sum(c * len(p) for c, p in zip(costs, pieces, strict=True)) + 5))
    return (
        pieces,
        allowed,
        costs,
        budget,
        draw(st.permutations(range(len(pieces)))),
        draw(st.sampled_from([2, 7, 1 << 20])),
    )


@pytest.mark.parametrize("even", [True, False])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_order_of_arrival_gives_one_stable_sort(even: bool, data: Any) -> None:
    pieces, allowed, costs, budget, order, chunk = data.draw(problems(even))
    before, select.CHUNK = select.CHUNK, chunk
    try:
        assert stream(pieces, allowed, costs, budget, order) == sort_everything(
            pieces, allowed, costs, budget
        )
    finally:
        select.CHUNK = before


@pytest.mark.parametrize("levels", [1, 3, 40, 10**6])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.99, 1.0, 1.5])
def test_thousands_of_entries_in_many_pieces(
    levels: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is trimmed many times; with few levels nearly all entries are tied."""
    monkeypatch.setattr(select, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(levels)
    pieces = [
        torch.randint(-levels, levels, (n,), generator=generator).float()
        for n in (3000, 1, 7000, 500, 2999, 64)
    ]
    k = round(share * sum(map(len, pieces)))
    order = torch.cat(pieces).sort(descending=True, stable=True).indices[:k]
    wanted = (
        torch.zeros(sum(map(len, pieces)), dtype=torch.bool)
        .index_fill_(0, order, True)
        .split([len(p) for p in pieces])
    )
    for arrival in (range(6), reversed(range(6)), (3, 0, 5, 1, 4, 2)):
        top = TopK(k, dict.fromkeys(range(6), 1))
        for p in arrival:
            top.add(p, pieces[p].clone())
        found = top.take()
        assert all(torch.equal(found[p].long(), wanted[p].nonzero().view(-1)) for p in range(6))


def test_a_unit_that_does_not_fit_ends_the_choice_whatever_the_order() -> None:
    """A unit of the first piece costs 10, the one of the second 4.

    After 9 and 8 there is room for the 6, but the 7 comes first and does not fit.
    """
    for order in ((0, 1), (1, 0)):
        top = TopK(25, {0: 10, 1: 4})
        for p in order:
            top.add(p, torch.tensor([[9.0, 8.0, 7.0], [6.0]][p]))
        assert {p: t.tolist() for p, t in top.take().items()} == {0: [0, 1], 1: []}


def test_a_unit_that_alone_exceeds_the_budget_is_never_taken() -> None:
    top = TopK(5, {0: 10, 1: 4})
    top.add(0, torch.tensor([9.0]))
    top.add(1, torch.tensor([1.0, 2.0]))
    assert {p: t.tolist() for p, t in top.take().items()} == {0: [], 1: [1]}


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        TopK(1, {0: 1}).add(0, torch.tensor([1.0, math.nan]))


@given(st.lists(SCORE, min_size=1, max_size=60))
@settings(deadline=None)
def test_keys_order_as_scores_do(scores: list[float]) -> None:
    rounded = torch.tensor(scores, dtype=torch.float32)
    scores = rounded.tolist()
    keys = sort_keys(rounded).tolist()  # in its memory
    for a, key in zip(scores, keys, strict=True):
        for b, other in zip(scores, keys, strict=True):
            assert (a < b) == (key < other)
    assert min(keys) > select.NEVER


@given(
    st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20), min_size=1, max_size=4),
    st.integers(1, 30),
)
@settings(deadline=None)
def test_kth_largest(arrays: list[list[int]], k: int) -> None:
    flat = sorted((x for a in arrays for x in a), reverse=True)
    if k <= len(flat):
        assert kth_largest([torch.tensor(a, dtype=torch.int32) for a in arrays], k) == flat[k - 1]


# Shares


def by_remainders(total: int, weights: list[float], caps: list[int]) -> list[float]:
    """Return the exact shares: a share above its cap is set to it, and the others divide the rest."""
    shares, open_ = [0.0] * len(caps), {i for i, c in enumerate(caps) if c}
    while True:
        left = total - sum(c for i, c in enumerate(caps) if c and i not in open_)
        whole = math.fsum(weights[i] for i in open_)
        for i in open_:
            shares[i] = weights[i] / whole * left if whole else left / len(open_)
        full = {i for i in open_ if shares[i] >= caps[i] * (1 - 1e-12)}
        if not full:
            return shares
        for i in full:
            shares[i] = caps[i]
        open_ -= full


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, 1e-3, 7.25, 1e6]), st.integers(0, 60)),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_apportion_is_exact_within_one_of_the_share_and_below_every_cap(
    pieces: list[tuple[float, int]], part: float
) -> None:
    weights, caps = [w for w, _ in pieces], [c for _, c in pieces]
    total = round(part * sum(caps))
    found = apportion(total, torch.tensor(weights), caps)
    assert sum(found) == total
    assert all(0 <= n <= c for n, c in zip(found, caps, strict=True))
    for n, share in zip(found, by_remainders(total, weights, caps), strict=True):
        assert abs(n - share) < 1 + 1e-6


def test_apportion_gives_the_rest_to_the_largest_remainders() -> None:
    assert apportion(8, torch.tensor([0.6, 0.3, 0.1]), [9, 9, 9]) == [5, 2, 1]
    assert apportion(8, torch.tensor([0.6, 0.3, 0.1]), [3, 9, 9]) == [3, 4, 1]
    assert apportion(4, torch.tensor([0.0, 0.0]), [9, 9]) == [2, 2]
    assert apportion(6, torch.tensor([1.0, 0.0]), [2, 9]) == [2, 4]


@pytest.mark.parametrize(
    ("total", "weights", "caps"),
    [(5, [1.0, 1.0], [2, 2]), (1, [1.0, math.inf], [2, 2]), (1, [1.0, -1.0], [2, 2])],
)
def test_apportion_refuses_what_it_cannot_divide(total: int, weights: list[float], caps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not fit|not finite"):
        apportion(total, torch.tensor(weights), caps)


# Memory


class Live(TorchDispatchMode):
    """Counts the largest number of bytes of live storages that operations have made; older storages do not
    count."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}  # tensors by storage
        self.now = self.most = 0
        self.old: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            a.untyped_storage()._cdata
            for a in torch.utils._pytree.tree_leaves((args, kwargs or {}))
            if isinstance(a, Tensor)
        }
        self.old |= {s for s in before if s not in self.users}
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in before & self.old:
                if key not in self.users:
                    self.old.discard(key)
                    self.users[key] = 0
                    self.now += t.untyped_storage().nbytes()
                    self.most = max(self.most, self.now)
                self.users[key] += 1
                weakref.finalize(t, self.gone, key, t.untyped_storage().nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


def test_live_counts_what_lives() -> None:
    old = torch.zeros(1000)
    with Live() as live:
        a = old + 1
        b = a.view(-1)[5:]
        del a
        old.add_(b[0])
        c = b * 2
        del b, c
        d = old[:3]
    assert (live.most, live.now, len(d)) == (4000 + 4 * 995, 0, 3)


LAYERS, ROWS, COLUMNS = 20, 256, 512
HISTOGRAMS = 5 * 8 * 2**16  # of 16 bits of the keys, as int64, and what becomes of them


def stack(dtype: torch.dtype = torch.float32, values: int = 0) -> nn.Module:
    """Return a model of linear layers; with ``values``, weights of that many different values."""
    model = nn.Sequential(*(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS))).requires_grad_(
        False
    )
    for p in model.parameters():
        p.copy_(torch.randint(values, p.shape) if values else torch.randn(p.shape))
    return model.to(dtype)


def bare_run(model: nn.Module) -> Any:
    """Return a run with what the engine uses, and with moments that a test may set."""
    moments: dict[Tensor, dict[str, Tensor]] = {}
    return SimpleNamespace(
        model=model,
        total=10,
        step=4,
        generator=torch.Generator(),
        average_or_broadcast=lambda tensor: tensor,
        log=lambda **_: None,
        all_moments=moments,
        moments=lambda parameter: moments.get(parameter, {}),
    )


@pytest.mark.parametrize(
    ("scope", "sparsity", "values"),
    [("model", 0.99, 1), ("model", 0.6, 0), ("model", 0.6, 2), ("matrix", 0.6, 0)],
)
def test_memory_of_a_choice_over_the_model(
    scope: Scope, sparsity: float, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the largest layer's scores, 12 bytes per entry and a constant, also with many ties."""
    monkeypatch.setattr(select, "CHUNK", 1 << 15)
    torch.manual_seed(0)
    model = stack(values=values)
    method = Crossing(sparsity=sparsity, score="magnitude", scope=scope, targets=("linear",))
    state = method.build(model)
    bank = state["bank"]
    groups = 1 if scope == "model" else LAYERS
    size = ROWS * COLUMNS * LAYERS // groups
    k = groups * (size - round(sparsity * size))
    run = bare_run(model)
    gc.collect()
    with Live() as live:
        method.begin(run, state, None)
    assert bank.active == k
    scores, chunks = 4 * ROWS * COLUMNS, 24 * select.CHUNK
    assert live.most <= scores + 12 * k + HISTOGRAMS + chunks
    assert live.most >= scores + 8 * k  # or the count sees nothing
    assert live.now <= 4 * k // 10  # nothing stays but what is cached


@pytest.mark.parametrize("schedule", [DropGrow(every=4, rate=0.5), Redraw(every=4)], ids=lambda s: s.name)
def test_memory_of_a_move_over_the_model(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bound, the two moments of the optimizer, and the entries that settle."""
    monkeypatch.setattr(select, "CHUNK", 1 << 15)
    torch.manual_seed(0)
    model = stack()
    method = Crossing(
        sparsity=0.6,
        score="magnitude",
        direction="smallest",
        scope="model",
        targets=("linear",),
        schedule=schedule,
    )
    bank = (state := method.build(model))["bank"]
    run, k = bare_run(model), len(bank.values)
    method.begin(run, state, None)
    bank.values.data.normal_()
    run.all_moments[bank.values] = {"exp_avg": torch.zeros(k), "exp_avg_sq": torch.zeros(k)}
    before = bank.index.clone()
    gc.collect()
    with Live() as live:
        method.before_step(run, state)
    settled = len(bank.settled_values)
    assert not torch.equal(bank.index, before)
    assert (settled > 0.1 * k) == (schedule.name == "redraw")
    assert live.most <= 4 * ROWS * COLUMNS + 12 * k + 8 * settled + HISTOGRAMS + 24 * select.CHUNK
    assert live.most >= 8 * k


@pytest.mark.parametrize("direction", ["largest", "smallest"])
def test_magnitudes_of_a_model_are_those_of_one_sort(direction: Any) -> None:
    session = contract.begin(Crossing(sparsity=0.9, score="magnitude", scope="model", direction=direction))
    session.start()
    bank = session.states["method"]["bank"]
    scores = torch.cat([layer.original.abs().view(-1) for layer in patched(session.model).values()])
    order = scores.sort(descending=direction == "largest", stable=True).indices[
        : len(scores) - round(0.9 * len(scores))
    ]
    offsets = [0, *torch.tensor(bank.sizes).cumsum(0).tolist()]
    found = torch.cat([bank.positions(i) + offsets[i] for i in range(len(bank.sizes))])
    assert torch.equal(found.long(), order.sort().values)
