"""Test the units of a weight against loops over single entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune.core.anatomy import find_head_width
from finetune.core.site import Site, find_sites
from finetune.core.sparse.choosing import choose_n_of_m
from finetune.core.sparse.grain import Grain, make_grain
from finetune.errors import ConfigError
from finetune.testing.sessions import Kind, tiny


def units(height: int, width: int, shape: tuple[int, int]) -> list[list[int]]:
    """Return the flat positions of each unit, in the order of the units."""
    found = []
    for top in range(0, shape[0], height):
        for left in range(0, shape[1], width):
            found.append(
                [i * shape[1] + j for i in range(top, top + height) for j in range(left, left + width)]
            )
    return found


@st.composite
def grains(draw: Any) -> tuple[Grain, list[list[int]]]:
    height, width, down, across = (draw(st.integers(1, 4)) for _ in range(4))
    shape = (height * down, width * across)
    return Grain(shape, height, width), units(height, width, shape)


@given(case=grains(), data=st.data())
@settings(deadline=None)
def test_pool_expand_and_members_are_loops_over_the_units(
    case: tuple[Grain, list[list[int]]], data: Any
) -> None:
    grain, every = case
    assert (grain.units, grain.size) == (len(every), len(every[0]))
    scores = torch.randn(grain.shape, generator=torch.Generator().manual_seed(0))
    means = torch.tensor([sum(float(scores.view(-1)[e]) for e in unit) / len(unit) for unit in every])
    torch.testing.assert_close(grain.pool(scores), means)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(every) - 1))))
    found = grain.expand(torch.tensor(chosen, dtype=torch.int32))
    assert found.dtype == torch.int32
    assert found.tolist() == sorted(e for u in chosen for e in every[u])
    some = sorted(data.draw(st.sets(st.integers(0, grain.shape[0] * grain.shape[1] - 1))))
    holds = [any(e in unit for e in some) for unit in every]
    assert grain.members(torch.tensor(some, dtype=torch.int32)).tolist() == holds
    assert grain.members(found).nonzero().view(-1).tolist() == chosen


def site(out: int, in_: int, role: str = "q") -> Site:
    return Site("some.layer", nn.Linear(in_, out), 0, role, (out, in_))


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        ("element", (1, 1)),
        ("row", (1, 6)),
        ("column", (4, 1)),
        ("matrix", (4, 6)),
        ("block:1", (1, 1)),
        ("block:2", (2, 2)),
    ],
)
def test_kinds(kind: str, unit: tuple[int, int]) -> None:
    grain = make_grain(kind, site(4, 6), nn.Module())
    assert (grain.height, grain.width, grain.m) == (*unit, 0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("block:3", "block:3.*some.layer, 4 x 6.*divisor"), ("2:4", "2:4.*6 inputs"), ("4:2", "n below m")],
)
def test_units_that_do_not_divide_the_weight_are_refused(kind: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_grain(kind, site(4, 6), nn.Module())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vit", {"q": (16, 32, 2), "k": (16, 32, 2), "v": (16, 32, 2), "o": (32, 16, 2)}),
        ("gpt2", {"qkv": (16, 32, 6), "o": (32, 16, 2)}),
        ("llama", {"q": (8, 32, 4), "k": (8, 32, 2), "v": (8, 32, 2), "o": (32, 8, 4)}),
    ],
)
def test_heads_are_rows_of_q_k_v_and_columns_of_o(
    kind: Kind, expected: dict[str, tuple[int, int, int]]
) -> None:
    """With grouped-query attention k and v have fewer heads; GPT-2 stores q, k and v in one matrix."""
    model = tiny(kind)
    found = {}
    for s in find_sites(model, ("attention",)):
        grain = make_grain("head", s, model)
        found[s.role] = (grain.height, grain.width, grain.units)
    assert found == expected


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_without_the_entries_of_a_head_unit_the_model_computes_as_without_the_head(kind: Kind) -> None:
    """Compare the input of the output projection, of which each head fills a slice."""
    model = tiny(kind)
    width = find_head_width(model)
    last = [s for s in find_sites(model, ("attention",)) if s.block == 1]
    taps: dict[str, torch.Tensor] = {}
    (o,) = (s for s in last if s.role == "o")
    values = next(s for s in last if s.role in ("v", "qkv"))
    grain = make_grain("head", values, model)
    o.module.register_forward_hook(lambda m, args, out: taps.update(x=args[0].detach()))
    inputs = (
        {"pixel_values": torch.randn(2, 3, 16, 16)}
        if kind == "vit"
        else {"input_ids": torch.randint(1, 40, (2, 7))}
    )
    head = grain.units - 1  # the last one holds values in every case
    with torch.no_grad():
        weight = values.module.weight.T if kind == "gpt2" else values.module.weight
        flat = weight.clone().reshape(-1)
        flat[grain.expand(torch.tensor([head])).long()] = 0
        weight.copy_(flat.view(weight.shape))
        bias = values.module.bias
        if bias is not None:
            bias.zero_()
        model(**inputs)
    silent = [h for h in range(32 // width) if not taps["x"].unflatten(-1, (-1, width))[..., h, :].any()]
    heads = 32 // width
    assert silent == list(range(heads - heads // (2 if kind == "llama" else heads), heads))


def test_layers_without_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"grain=head: some.layer \(up\).*targets=attention"):
        make_grain("head", site(4, 6, "up"), tiny())
    with pytest.raises(ConfigError, match="no heads"):
        make_grain("head", site(4, 6), nn.Module())


@given(st.integers(2, 5), st.data())
@settings(deadline=None)
def test_n_of_m_takes_the_best_n_of_every_m_inputs(of: int, data: Any) -> None:
    best, rows, groups = (
        data.draw(st.integers(1, of - 1)),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 4)),
    )
    entries = rows * groups * of
    scores = data.draw(
        st.lists(st.sampled_from([-1.0, 0.0, -0.0, 2.0, 3.0]), min_size=entries, max_size=entries)
    )
    grain = make_grain(f"{best}:{of}", site(rows, groups * of), nn.Module())
    wanted = []
    for start in range(0, entries, of):
        wanted += sorted(sorted(range(start, start + of), key=lambda i: (-scores[i], i))[:best])
    found = choose_n_of_m(torch.tensor(scores).view(rows, groups * of), grain)
    assert (found.tolist(), found.dtype) == (wanted, torch.int32)


def test_n_of_m_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        choose_n_of_m(torch.tensor([[0.0, float("nan")]]), make_grain("1:2", site(1, 2), nn.Module()))
