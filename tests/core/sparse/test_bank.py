"""Test the bank: slices, moves, packed form and refusals. A dictionary of entries is the oracle of a move."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune.core.attach import patched
from finetune.core.site import Site
from finetune.core.sparse.bank import Bank
from finetune.errors import ConfigError
from finetune.methods.sparse.sparse import Crossing
from finetune.schedules.drop_grow import DropGrow
from finetune.storage import checkpoint
from finetune.storage.delta import load_delta, save_delta
from finetune.testing import contract

SHAPES = ((6, 5), (40, 30), (3, 2))


def sites(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Site]:
    return [Site(str(i), nn.Linear(s[1], s[0]), i, "q", s) for i, s in enumerate(shapes)]


def bank(counts: tuple[int, ...] = (4, 100, 6), slack: int = 0) -> Bank:
    torch.manual_seed(0)
    made = Bank(sites(), sum(counts) + slack)
    made.place(
        [torch.randperm(s[0] * s[1])[:c].sort().values.int() for s, c in zip(SHAPES, counts, strict=True)]
    )
    made.values.data[: sum(counts)] = torch.arange(sum(counts)).float()
    return made


@torch.no_grad()
def changes(b: Bank) -> dict[tuple[int, int], float]:
    return {(i, int(w)): float(v) for i in range(len(b.sizes)) for v, w in zip(*b.all(i), strict=True)}


def test_slices_are_contiguous_and_places_ascend() -> None:
    b = bank()
    assert torch.equal(torch.cat([b.slice(i) for i in range(3)]), b.values)
    assert [len(b.positions(i)) for i in range(3)] == [4, 100, 6]
    assert all((b.positions(i).diff() > 0).all() for i in range(3))
    assert torch.equal(b.positions(2), torch.arange(6, dtype=torch.int32))


def test_one_split_serves_a_whole_pass_and_no_gradient_passes_do_not_disturb_it() -> None:
    b = bank()
    first = b.slice(0).grad_fn
    with torch.no_grad():
        assert not b.slice(0).requires_grad
    assert b.slice(1).grad_fn is first
    with torch.no_grad():
        b.values += 1
    assert b.slice(0).grad_fn is not first


@pytest.mark.parametrize("slack", [0, 3])
def test_gradients_of_slices_join_without_padding_and_across_passes(slack: int) -> None:
    b = bank(slack=slack)
    for _ in range(2):
        (2 * b.slice(0).sum() + 3 * b.slice(2).sum()).backward()
    assert torch.equal(
        b.values.grad,
        torch.cat([torch.full((4,), 4.0), torch.zeros(100), torch.full((6,), 6.0), torch.zeros(slack)]),
    )


def test_a_frozen_site_gets_no_gradient() -> None:
    b = bank()
    b.frozen[2] = True
    (2 * b.slice(0).sum() + 3 * b.slice(2).sum()).backward()
    assert torch.equal(b.values.grad, torch.cat([torch.full((4,), 2.0), torch.zeros(106)]))


@pytest.mark.parametrize("kind", ["place", "revise"])
def test_more_than_the_room_is_refused_and_nothing_moves(kind: str) -> None:
    b = bank((1, 2, 3), slack=1)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    index = [
        torch.arange(3, dtype=torch.int32),
        torch.arange(3, dtype=torch.int32),
        torch.arange(2, dtype=torch.int32),
    ]
    with pytest.raises(ValueError, match="8 entries do not fit into a bank of 7"):
        b.place(index) if kind == "place" else b.revise(index, {}, "base")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in before.items())


# Moves

SMALL = ((2, 3), (3, 4), (1, 5))
CAPACITY = 12
Entry = tuple[int, int]


class Ledger:
    """The expected content of a bank by entry: value and moments of trained ones, change of settled ones."""

    def __init__(self) -> None:
        self.trained: dict[Entry, tuple[float, float, float]] = {}
        self.settled: dict[Entry, float] = {}

    def revise(self, chosen: list[Entry], dropped: str, seeds: Tensor | None) -> list[int]:
        """Move the entries; return the slots of the newcomers."""
        old = self.trained
        fresh = [slot for slot, e in enumerate(chosen) if e not in old]
        self.trained = {
            e: old.get(e, (self.settled.get(e, 0.0), 0.0 if seeds is None else float(seeds[slot]), 0.0))
            for slot, e in enumerate(chosen)
        }
        gone = {e: v for e, (v, _, _) in old.items() if e not in self.trained and dropped == "kept"}
        self.settled = {e: v for e, v in (self.settled | gone).items() if e not in self.trained}
        return fresh

    def agrees(self, b: Bank, moments: dict[str, Tensor]) -> None:
        trained, settled = [], {}
        for i in range(len(SMALL)):
            where = b.positions(i).tolist()
            assert where == sorted(where)
            trained += [(i, w) for w in where]
            values, places = b.settled(i)
            assert places.tolist() == sorted(places.tolist())
            settled |= {(i, w): v for w, v in zip(places.tolist(), values.tolist(), strict=True)}
        assert trained == list(self.trained)
        n = len(trained)
        for t, column in ((b.values, 0), (moments["exp_avg"], 1), (moments["exp_avg_sq"], 2)):
            assert t[:n].tolist() == [row[column] for row in self.trained.values()]
            assert not t[n:].any(), "slack is not 0"
        assert b.active == n
        assert not b.index[n:].any()
        assert settled == self.settled


@given(
    st.lists(
        st.tuples(
            st.sets(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=CAPACITY),
            st.sampled_from(["base", "kept"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None)
def test_moves_against_a_dictionary_of_entries(
    moves: list[tuple[set[Entry], Literal["base", "kept"], bool]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    b, ledger = Bank(sites(SMALL), CAPACITY), Ledger()
    moments = {"exp_avg": torch.zeros(CAPACITY), "exp_avg_sq": torch.zeros(CAPACITY)}
    for chosen, dropped, seeded in moves:
        seeds = torch.randn(CAPACITY, generator=generator) if seeded else None
        index = [
            torch.tensor(sorted(w for j, w in chosen if j == i), dtype=torch.int32) for i in range(len(SMALL))
        ]
        found = b.revise(index, moments, dropped, None if seeds is None else {"exp_avg": seeds})
        assert found.tolist() == ledger.revise(sorted(chosen), dropped, seeds)
        assert found.dtype == torch.int64
        ledger.agrees(b, moments)
        with torch.no_grad():  # a step of training, new bits for every trained entry
            for t in (b.values.data, *moments.values()):
                t[: b.active] += torch.randn(b.active, generator=generator)
        rows = torch.stack([b.values.detach(), moments["exp_avg"], moments["exp_avg_sq"]], 1).tolist()
        ledger.trained = {e: tuple(rows[slot]) for slot, e in enumerate(ledger.trained)}  # type: ignore[misc]


def test_a_settled_entry_returns_with_its_change() -> None:
    b = bank()
    whole = changes(b)
    first = [b.positions(i).clone() for i in range(3)]
    b.revise([w[:2] for w in first], {}, "kept")
    assert (b.active, len(b.settled_values)) == (6, 104)
    fresh = b.revise(first, {}, "kept")
    assert (b.active, len(b.settled_values), len(fresh)) == (110, 0, 104)
    assert changes(b) == whole


@pytest.mark.parametrize("dropped", ["base", "kept"])
def test_a_move_changes_the_weights_only_where_entries_return_to_the_base(
    dropped: Literal["base", "kept"],
) -> None:
    """Newcomers start at 0, and with ``kept`` the output stays the same to the bit."""
    session = contract.finish(contract.begin(Crossing(sparsity=0.8)))
    b: Bank = session.states["method"]["bank"]
    layers = list(patched(session.model).values())
    before, output = [layer.weight.clone() for layer in layers], contract.logits(session.tuned)
    old = [b.positions(i).clone() for i in range(len(layers))]
    generator = torch.Generator().manual_seed(5)
    new = [
        torch.randperm(n, generator=generator)[: len(w)].sort().values.int()
        for n, w in zip(b.sizes, old, strict=True)
    ]
    b.revise(new, {}, dropped)
    moved = 0
    for layer, weight, was, now in zip(layers, before, old, new, strict=True):
        gone = torch.tensor(sorted(set(was.tolist()) - set(now.tolist())))
        expected = weight.clone()
        if dropped == "base":
            expected.view(-1)[gone] = layer.original.reshape(-1)[gone]
        assert torch.equal(layer.weight, expected)
        moved += len(gone)
    assert moved > 100
    assert torch.equal(contract.logits(session.tuned), output) == (dropped == "kept")


def test_a_checkpoint_comes_back_with_settled_entries_of_another_number(tmp_path: Path) -> None:
    """Resume in the middle of a run whose dropped entries keep their change."""

    def start() -> Any:
        return contract.begin(
            Crossing(sparsity=0.9, score="gradient", schedule=DropGrow(every=2, rate=0.5, dropped="kept"))
        )

    session, resumed = start(), start()
    for step in session.steps():
        if step.number == 5:
            break
    b, other = session.states["method"]["bank"], resumed.states["method"]["bank"]
    assert len(b.settled_values) > 100
    assert len(other.settled_values) == 0
    checkpoint.save(tmp_path / "at", session, {})
    checkpoint.load(tmp_path / "at", resumed)
    for name, tensor in b.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert [b.bounds("settled_starts"), b.bounds()] == [other.bounds("settled_starts"), other.bounds()]
    assert torch.equal(contract.logits(session.tuned), contract.logits(resumed.tuned))


# Stored form


def test_pack_and_unpack_is_exact_into_other_counts() -> None:
    b, other = bank(), bank((1, 2, 3))
    other.unpack(b.pack())
    for name, tensor in b.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert tensor.dtype == other.state_dict()[name].dtype


@given(*[st.sets(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=CAPACITY) for _ in range(3)])
@settings(deadline=None)
def test_what_is_stored_is_the_union_of_trained_and_settled_entries(
    first: set[Entry], second: set[Entry], third: set[Entry]
) -> None:
    b, other = Bank(sites(SMALL), CAPACITY), Bank(sites(SMALL), 1)
    union: dict[Entry, float] = {}
    for n, chosen in enumerate((first, second, third), 1):
        b.revise(
            [torch.tensor(sorted(w for j, w in chosen if j == i), dtype=torch.int32) for i in range(3)],
            {},
            "kept",
        )
        b.values.data[: b.active] = n
        union |= dict.fromkeys(chosen, float(n))
    assert changes(b) == union
    other.unpack(b.pack())
    assert changes(other) == union
    assert len(other.settled_values) == 0
    assert all((other.positions(i).diff() > 0).all() for i in range(3))


def test_stored_after_moves_gives_the_same_output(tmp_path: Path) -> None:
    method = Crossing(sparsity=0.9, score="gradient", schedule=DropGrow(every=2, rate=0.5, dropped="kept"))
    trained, new = contract.finish(contract.begin(method)), contract.begin(method)
    save_delta(tmp_path / "delta", trained.states, {})
    load_delta(tmp_path / "delta", new.states)
    assert len(trained.states["method"]["bank"].settled_values) > 100
    assert torch.equal(contract.logits(trained.tuned), contract.logits(new.tuned))


def test_a_packed_bank_of_other_sites_is_refused() -> None:
    stored = bank().pack()
    for shapes in (((2, 2),), ((40, 30), (6, 5), (3, 2)), ((6, 5), (3, 2), (40, 30))):
        with pytest.raises(ConfigError, match="does not fit"):
            Bank(sites(shapes), 1).unpack(stored)
    with pytest.raises(ConfigError, match="damaged"):
        bank().unpack({**stored, "gaps": stored["gaps"][:-1]})


def test_unpacking_again_is_seen_at_once() -> None:
    """Values derived from the positions are computed again, even if the new tensors reuse memory."""
    b = bank()
    for counts in ((1, 2, 3), (5, 7, 0), (2, 2, 2), (0, 9, 1)):
        b.unpack(bank(counts).pack())
        assert tuple(len(b.positions(i)) for i in range(3)) == counts
        assert tuple(len(b.slice(i)) for i in range(3)) == counts
