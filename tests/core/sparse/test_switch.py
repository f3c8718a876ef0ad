"""Test switching of sparse changes on a live model, against dense sums and untouched copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune.core.attach import attach
from finetune.core.changes import SparseChange
from finetune.core.site import find_sites
from finetune.core.sparse.coding import encode_sorted
from finetune.core.sparse.switch import Switch, add, pack, unpack
from finetune.errors import ConfigError
from finetune.methods.reparam.lora import LowRank
from finetune.methods.sparse.shira import SHiRA
from finetune.testing.sessions import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def changes(model: nn.Module, seed: int, share: float = 0.3) -> dict[str, SparseChange]:
    """Return random changes of every linear layer, as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in find_sites(model, ("all",)):
        index = (torch.rand(site.size, generator=generator) < share).nonzero().view(-1)
        found[site.name] = SparseChange(index, 0.02 * torch.randn(len(index), generator=generator))
    return found


def dense(model: nn.Module, *parts: dict[str, SparseChange]) -> dict[str, Tensor]:
    """Return the expected weights: the float32 sum of the changes, added to the weight and rounded once."""
    wanted = {}
    for site in find_sites(model, ("all",)):
        layer: Any = site.module
        total = torch.zeros(site.shape, dtype=torch.float64)
        for part in parts:
            rows, cols = part[site.name].index // site.shape[1], part[site.name].index % site.shape[1]
            total[rows, cols] += part[site.name].values
        weight = (layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight).detach()
        wanted[site.name] = torch.where(total != 0, (weight.float() + total.float()).to(weight.dtype), weight)
    return wanted


def weights(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site in find_sites(model, ("all",)):
        layer: Any = site.module
        found[site.name] = (
            (layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight).detach().clone()
        )
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compare to the bit, signs of zeros included."""
    bits = {4: torch.int32, 2: torch.int16}
    return all(
        torch.equal(
            a[n].contiguous().view(bits[a[n].element_size()]),
            b[n].contiguous().view(bits[b[n].element_size()]),
        )
        for n in {*a, *b}
    )


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_writes_the_rounded_sum_and_revert_restores_the_bits(kind: Any, dtype: torch.dtype) -> None:
    """The rest of the model does not change."""
    model = tiny(kind).to(dtype)
    before, change = copy.deepcopy(model.state_dict()), changes(model, 1)
    wanted = dense(model, change)
    switch = Switch(model)
    switch.load("a", change)
    assert same(model.state_dict(), before)
    switch.apply("a")
    assert same(weights(model), wanted)
    assert switch.active == ("a",)
    switch.revert()
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_does_not_matter_and_overlaps_add(dtype: torch.dtype) -> None:
    """The order changes no bit; adding one change after the other differs by one rounding."""
    model = tiny().to(dtype)
    before, a, b, c = weights(model), changes(model, 1), changes(model, 2), changes(model, 3)
    alone, pair, all_three = dense(model, b), dense(model, a, b), dense(model, a, b, c)
    switch = Switch(model)
    for name, change in (("a", a), ("b", b), ("c", c)):
        switch.load(name, change)
    for order in ("ab", "ba"):
        for name in order:
            switch.apply(name)
        assert same(weights(model), pair)
        switch.revert()
    one_by_one = {
        n: (dense(model, a)[n].float() + (dense(model, b)[n].float() - before[n].float())).to(dtype)
        for n in before
    }
    gap = torch.finfo(dtype).eps
    for name, weight in pair.items():
        torch.testing.assert_close(
            weight, one_by_one[name], rtol=0, atol=4 * gap * float(one_by_one[name].abs().max())
        )
    for order in ("cab", "bca"):
        for name in order:
            switch.apply(name)
        assert same(weights(model), all_three)
        switch.revert(order[0])
        switch.to("b")
        assert same(weights(model), alone)
        switch.revert("b")
        assert same(weights(model), before)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from(["a", "b", "c", "d"])), max_size=6),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)
def test_any_walk_between_sets_ends_where_the_last_set_says(
    walk: list[set[str]], seed: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)
    before, parts = weights(model), {name: changes(model, seed + i, 0.5) for i, name in enumerate("abcd")}
    wanted = [dense(model, *(parts[n] for n in sorted(names))) for names in walk]
    switch = Switch(model)
    for name, part in parts.items():
        switch.load(name, part)
    for names, weight in zip(walk, wanted, strict=True):
        switch.to(*names)
        assert same(weights(model), weight)
    switch.to()
    assert same(weights(model), before)


def test_loading_while_another_is_in_keeps_the_true_originals() -> None:
    model = tiny()
    before, a, b = weights(model), changes(model, 1), changes(model, 2)
    first, second, both = dense(model, a), dense(model, b), dense(model, a, b)
    switch = Switch(model)
    switch.load("a", a)
    switch.apply("a")
    switch.load("b", b)
    assert switch.active == ("a",)
    assert same(weights(model), first)
    switch.to("b")
    assert same(weights(model), second)
    switch.apply("a")
    assert same(weights(model), both)
    switch.revert()
    assert same(weights(model), before)


def test_deterministic_mode_gives_the_same_without_a_warning() -> None:
    model = tiny()
    before, a = weights(model), changes(model, 1)
    wanted = dense(model, a)
    switch = Switch(model)
    switch.load("a", a)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        switch.apply("a")
        assert same(weights(model), wanted)
        switch.revert()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights(model), before)


@pytest.mark.parametrize("how", ["optimizer", "load", "dtype", "replaced", "in place"])
@pytest.mark.parametrize("active", [True, False])
def test_weights_that_something_else_changed_are_left_alone(how: str, active: bool) -> None:
    model = tiny()
    switch = Switch(model)
    switch.load("a", changes(model, 1))
    if active:
        switch.apply("a")
    layer: Any = find_sites(model, ("all",))[3].module
    if how == "optimizer":
        layer.weight.grad = torch.ones_like(layer.weight)
        torch.optim.AdamW([layer.weight], fused=True).step()
    elif how == "load":
        model.load_state_dict(tiny().state_dict())
    elif how == "dtype":
        model.to(torch.bfloat16)
    elif how == "replaced":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        with torch.no_grad():
            layer.weight[0, 0] += 1
    now = weights(model)
    for act in (switch.revert, lambda: switch.to("a"), lambda: switch.load("b", changes(model, 2))):
        with pytest.raises(RuntimeError, match="changed, moved or replaced"):
            act()
    assert same(weights(model), now)


def test_backward_through_a_switch_is_refused() -> None:
    """Autograd must notice that the weight it saved has changed."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    switch = Switch(model)
    switch.load("a", changes(model, 1, 0.9))
    loss = model(torch.randn(5, 4)).sum()
    switch.apply("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_does_not_fit_is_refused_all_at_once_and_nothing_is_loaded() -> None:
    model = tiny()
    first, second, third, fourth, fifth = (s.name for s in find_sites(model, ("all",))[:5])
    attach(model, fifth, LowRank((32, 32), 2, 1.0, 0.0))
    one = torch.ones(2)
    wrong = {
        "nowhere": SparseChange(torch.tensor([0, 1]), one),
        "vit.layernorm": SparseChange(torch.tensor([0, 1]), one),
        first: SparseChange(torch.tensor([1, 1]), one),
        second: SparseChange(torch.tensor([0, 32 * 32]), one),
        third: SparseChange(torch.tensor([0, 1, 2]), one),
        fourth: SparseChange(torch.tensor([-1, 1]), one),
        fifth: SparseChange(torch.tensor([0, 1]), one),
    }
    switch = Switch(model)
    with pytest.raises(ConfigError) as caught:
        switch.load("a", wrong)
    assert len(caught.value.faults) == len(wrong)
    assert switch.loaded == ()
    with pytest.raises(ConfigError, match="No change called 'a'"):
        switch.apply("a")


def test_tied_weights_are_refused() -> None:
    model = tiny("gpt2")
    head: Any = model.lm_head
    assert head.weight is model.transformer.wte.weight
    with pytest.raises(ConfigError, match="shares its weight"):
        Switch(model).load("a", {"lm_head": SparseChange(torch.tensor([3]), torch.ones(1))})


def test_names_are_used_once() -> None:
    model = tiny()
    switch = Switch(model)
    switch.load("a", changes(model, 1))
    with pytest.raises(ConfigError, match="loaded already"):
        switch.load("a", changes(model, 2))
    with pytest.raises(ConfigError, match="is not active"):
        switch.revert("a")
    switch.apply("a")
    with pytest.raises(ConfigError, match="active already"):
        switch.apply("a")


def test_pack_is_the_banks_form_and_reads_rows_first() -> None:
    """The weights are not square, so reading columns first would find other entries."""
    model = tiny()
    sites, made = find_sites(model, ("all",)), changes(model, 1)
    stored = pack([made[s.name] for s in sites], [s.size for s in sites])
    for back, site in zip(unpack(stored, [s.size for s in sites]), sites, strict=True):
        assert torch.equal(back.index, made[site.name].index)
        assert torch.equal(back.values, made[site.name].values)
    wanted = dense(model, made)
    state: Any = SHiRA().build(model)
    state["bank"].unpack(stored)
    for site in sites:
        assert torch.equal(model.get_submodule(site.name).weight, wanted[site.name])
    again = state["bank"].pack()
    assert all(torch.equal(again[key], stored[key]) for key in ("values", "starts", "gaps"))


def test_unpack_refuses_other_weights() -> None:
    stored = {
        "values": torch.ones(3),
        "starts": torch.tensor([0, 2, 3]),
        "gaps": encode_sorted(torch.tensor([1, 5, 8])),
    }
    assert [c.index.tolist() for c in unpack(stored, [6, 4])] == [[1, 5], [2]]
    for sizes in ([6], [6, 4, 4], [5, 4], [6, 2]):
        with pytest.raises(ConfigError, match="stored sparse change"):
            unpack(stored, sizes)


def test_add_joins_positions_and_sums_where_they_meet() -> None:
    total = add(
        [
            SparseChange(torch.tensor([1, 4]), torch.tensor([1.0, 2.0])),
            SparseChange(torch.tensor([0, 4, 9]), torch.tensor([3.0, -0.5, 4.0])),
        ]
    )
    assert total.index.tolist() == [0, 1, 4, 9]
    assert total.values.tolist() == [3.0, 1.0, 1.5, 4.0]
