"""Compare the gradient of chosen entries with the whole gradient, in float64."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.core.sparse import gradient
from finetune.core.sparse.gradient import (
    dense,
    entries_gradient,
    make_layout,
    read,
    sampled,
    sampled_pays,
    used_columns,
    write_,
)

SHAPE = (70, 50)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some(count: int, shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    return (
        torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
        .sort()
        .values.to(torch.int32)
    )


def positions(rows: Tensor, cols: Tensor, shape: tuple[int, int] = SHAPE) -> Tensor:
    return (rows[:, None] * shape[1] + cols).view(-1).to(torch.int32)


def oracle(grad_y: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Compute the gradient by autograd, through a layer."""
    weight = torch.zeros(grad_y.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(x.double() @ weight.T, weight, grad_y.double())
    return whole.view(-1)[index.long()]


EVERY_ROW, EVERY_COL = torch.arange(SHAPE[0]), torch.arange(SHAPE[1])
LAYOUTS = {
    "none": some(0),
    "one": some(1),
    "few": some(9),
    "scattered": some(700),
    "all": some(3500),
    "all but one": some(3499),
    "rows": positions(torch.tensor([0, 7, 69]), EVERY_COL),
    "most rows": positions(EVERY_ROW[3:], EVERY_COL),
    "columns": positions(EVERY_ROW, torch.tensor([2, 49])),
    "block": positions(torch.arange(16, 32), torch.arange(5, 10)),
    "blocks": positions(torch.tensor([0, 1, 2, 40, 41]), torch.tensor([3, 30, 31])),
    "half a block": positions(torch.arange(16, 32), torch.arange(5, 26))[::2].contiguous(),
    "half of some rows": positions(torch.arange(8), EVERY_COL)[1::3].contiguous(),
    "half of some columns": positions(EVERY_ROW, torch.arange(8))[::3].contiguous(),
}


@pytest.fixture(params=["by the rule", "sampled", "dense", "dense in blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each way of computing on each case, with several chunks of tokens and blocks of rows."""
    if request.param != "by the rule":
        monkeypatch.setattr(gradient, "CHUNK", 16)
        monkeypatch.setattr(gradient, "sampled_pays", lambda *_: request.param == "sampled")
    if request.param == "dense in blocks":
        monkeypatch.setattr(gradient, "BLOCK_ROWS", 4)
        monkeypatch.setattr(gradient, "BLOCK", {"cpu": 1})
    return str(request.param)


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_whole_gradient_at_those_entries(way, name):
    index = LAYOUTS[name]
    layout = make_layout(index, SHAPE)
    for tokens in (1, 37, 48):
        grad_y, x = draw(tokens, SHAPE[0]), draw(tokens, SHAPE[1], seed=1)
        expected = oracle(grad_y, x, index)
        for given_x in (x, used_columns(x, layout)):
            found = entries_gradient(grad_y, given_x, index, SHAPE, layout)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_size_any_entries(data):
    out, in_, tokens = (
        data.draw(st.integers(1, m), label) for m, label in ((20, "out"), (20, "in"), (600, "tokens"))
    )
    index = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, out * in_ - 1)), "index")), dtype=torch.int32
    )
    grad_y, x = draw(tokens, out), draw(tokens, in_, seed=1)
    layout = make_layout(index, (out, in_))
    at = gradient._inside(index, (out, in_), layout)
    expected = oracle(grad_y, x, index)
    for found in (
        entries_gradient(grad_y, used_columns(x, layout), index, (out, in_), layout),
        sampled(grad_y, x, at, layout.size((out, in_)), layout.rows, layout.cols),
        dense(grad_y, x, at, layout.size((out, in_)), layout.rows, layout.cols),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    weight = draw(out, in_, seed=2)
    assert torch.equal(read(weight, index, layout), weight.view(-1)[index.long()])


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, 69)), st.sets(st.integers(0, 49)))
def test_a_whole_sub_matrix_is_recognised(rows, cols):
    r, c = torch.tensor(sorted(rows), dtype=torch.long), torch.tensor(sorted(cols), dtype=torch.long)
    index = positions(r, c)
    layout = make_layout(index, SHAPE)
    assert layout.full
    if len(index):
        assert layout.size(SHAPE) == (len(r), len(c))
        assert (layout.rows is None) == (len(r) == 70)
        assert layout.rows is None or torch.equal(layout.rows, r)
        assert layout.cols is None or torch.equal(layout.cols, c)
    if (
        len(index) > 4
    ):  # no longer whole, but the same rows and columns: the small matrix serves while it is clearly smaller
        without = make_layout(torch.cat([index[:1], index[2:]]), SHAPE)
        assert not without.full or min(len(r), len(c)) == 1
        assert without.rows is None or 4 * len(r) < 3 * 70 or without.full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["scattered", "rows", "half a block"])
def test_narrow_inputs_are_summed_in_float32(way, name, dtype):
    index = LAYOUTS[name]
    grad_y, x = draw(500, SHAPE[0], dtype=dtype), draw(500, SHAPE[1], seed=1, dtype=dtype)
    found = entries_gradient(grad_y, x, index, SHAPE, make_layout(index, SHAPE))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), oracle(grad_y, x, index), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["scattered", "rows", "columns", "half a block"])
def test_strides_do_not_matter(way, name):
    index = LAYOUTS[name]
    layout = make_layout(index, SHAPE)
    grad_y, x = draw(40, SHAPE[0]), draw(40, SHAPE[1], seed=1)
    expected = oracle(grad_y, x, index)
    wide = torch.zeros(80, 2 * SHAPE[0], dtype=torch.float64)
    wide[::2, ::2] = grad_y
    for y, z in ((grad_y.T.contiguous().T, x), (grad_y, x.T.contiguous().T), (wide[::2, ::2], x)):
        torch.testing.assert_close(
            entries_gradient(y, z, index, SHAPE, layout), expected, rtol=1e-12, atol=1e-12
        )
    same = grad_y[:1].expand(40, -1)
    torch.testing.assert_close(
        entries_gradient(same, x, index, SHAPE, layout), oracle(same, x, index), rtol=1e-12, atol=1e-12
    )


def test_no_tokens_no_gradient(way):
    index = LAYOUTS["scattered"]
    found = entries_gradient(draw(0, SHAPE[0]), draw(0, SHAPE[1]), index, SHAPE, make_layout(index, SHAPE))
    assert torch.equal(found, torch.zeros(700, dtype=torch.float64))


def test_the_same_bits_twice(way):
    index = LAYOUTS["scattered"]
    grad_y, x = draw(300, SHAPE[0], dtype=torch.float32), draw(300, SHAPE[1], seed=1, dtype=torch.float32)
    first, second = (
        entries_gradient(grad_y.clone(), x.clone(), index, SHAPE, make_layout(index, SHAPE)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_product_is_in_full_precision_under_autocast(way):
    index = LAYOUTS["scattered"]
    grad_y, x = draw(300, SHAPE[0], dtype=torch.float32), draw(300, SHAPE[1], seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entries_gradient(grad_y, x, index, SHAPE, make_layout(index, SHAPE))
    torch.testing.assert_close(found.double(), oracle(grad_y, x, index), rtol=1e-4, atol=1e-4)


def test_only_columns_in_use_are_kept():
    x = draw(2, 6, 50)
    few = make_layout(LAYOUTS["columns"], SHAPE)
    assert torch.equal(used_columns(x, few), x[..., [2, 49]])
    for name in ("scattered", "rows", "all"):
        assert used_columns(x, make_layout(LAYOUTS[name], SHAPE)) is x
    half = make_layout(positions(EVERY_ROW, torch.arange(25)), SHAPE)
    assert half.cols is not None
    assert used_columns(x, half) is x


def test_the_rule_samples_where_few_entries_are_trained():
    size = 3072 * 768
    assert sampled_pays(3072, 768, size // 100)
    assert not sampled_pays(3072, 768, size // 10)
    assert not sampled_pays(8, 8, 1)


def test_the_rule_decides(monkeypatch):
    asked = []
    monkeypatch.setattr(gradient, "sampled_pays", lambda *sizes: asked.append(sizes))
    for name in ("scattered", "rows", "half a block"):
        index = LAYOUTS[name]
        entries_gradient(draw(5, 70), draw(5, 50), index, SHAPE, make_layout(index, SHAPE))
    assert asked == [
        (70, 50, 700),
        (16, 21, 168),
    ]  # of a whole sub-matrix nothing is asked, of part of one its own size


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stored", ["as it is", "transposed"])
def test_entries_are_read_and_written_to_the_bit(name, stored):
    index = LAYOUTS[name]
    layout, there = make_layout(index, SHAPE), index.long()
    was = torch.are_deterministic_algorithms_enabled()
    for dtype, deterministic in product((torch.float32, torch.bfloat16), (False, True)):
        before, new = draw(*SHAPE, dtype=dtype), draw(len(index), seed=3, dtype=dtype)
        weight = before.clone() if stored == "as it is" else before.T.contiguous().T
        expected = before.clone()
        expected.view(-1)[there] = new
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            entries = read(weight, index, layout)
            write_(weight, index, layout, new)
            assert torch.equal(weight, expected)
            write_(weight, index, layout, entries)
        finally:
            torch.use_deterministic_algorithms(was)
        assert torch.equal(entries, before.view(-1)[there])
        assert torch.equal(weight, before)
