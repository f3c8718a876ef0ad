from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.core.sparse.coding import decode_sorted, encode_sorted
from finetune.errors import ConfigError

TOP = 2**63 - 1
ascending = st.lists(st.one_of(st.integers(0, 300), st.integers(0, TOP))).map(sorted)


def slow_code(index: list[int]) -> list[int]:
    """Encode gaps in LEB128, one number after the other."""
    code, last = [], 0
    for number in index:
        gap, last = number - last, number
        while gap >= 128:
            code.append(gap % 128 + 128)
            gap //= 128
        code.append(gap)
    return code


@given(ascending)
@settings(deadline=None)
def test_round_trip_and_the_code_of_the_definition(index: list[int]) -> None:
    code = encode_sorted(torch.tensor(index, dtype=torch.int64))
    assert code.dtype == torch.uint8
    assert code.tolist() == slow_code(index)
    back = decode_sorted(code, len(index))
    assert back.dtype == torch.int64
    assert back.tolist() == index


@given(st.binary(max_size=40), st.integers(0, 12))
@settings(deadline=None)
def test_any_bytes_either_are_a_code_or_are_refused(data: bytes, count: int) -> None:
    """Only what the encoder writes is accepted, so no index has two codes."""
    code = torch.tensor(list(data), dtype=torch.uint8)
    try:
        index = decode_sorted(code, count)
    except ConfigError:
        return
    assert len(index) == count
    assert torch.equal(encode_sorted(index), code)


@given(ascending.filter(bool), st.data())
@settings(deadline=None)
def test_a_code_cut_anywhere_is_refused(index: list[int], data: st.DataObject) -> None:
    code = encode_sorted(torch.tensor(index, dtype=torch.int64))
    with pytest.raises(ConfigError, match="damaged"):
        decode_sorted(code[: data.draw(st.integers(0, len(code) - 1))], len(index))


def test_two_percent_density_takes_at_most_two_bytes_an_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(3072 * 768, generator=generator).lt(0.02).nonzero().flatten()
    code = encode_sorted(index)
    assert 1.0 <= len(code) / len(index) <= 1.1
    assert torch.equal(decode_sorted(code, len(index)), index)
    evenly = torch.arange(0, 3072 * 768, 50, dtype=torch.int32)
    assert len(encode_sorted(evenly)) == len(evenly)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_every_integer_type_encodes_alike(dtype: torch.dtype) -> None:
    assert encode_sorted(torch.tensor([0, 3, 3, 127], dtype=dtype)).tolist() == [0, 3, 0, 124]


@pytest.mark.parametrize(
    "index",
    [torch.tensor([2, 1]), torch.tensor([-1, 1]), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1)],
)
def test_the_encoder_refuses_what_it_cannot_code(index: Tensor) -> None:
    with pytest.raises(ValueError, match="indices must"):
        encode_sorted(index)


@pytest.mark.parametrize(
    ("code", "count", "says"),
    [
        ([5, 130], 2, "hold 1 whole indices instead of 2"),
        ([5, 130], 1, "hold 1 whole indices"),
        ([5, 6], 1, "hold 2 whole"),
        ([], 1, "hold 0 whole"),
        ([133, 0], 1, "too many bytes"),
        ([255] * 9 + [1], 1, "too many bytes"),
        ([255] * 8 + [127, 1], 2, "beyond 63 bits"),
    ],
)
def test_damage_is_named(code: list[int], count: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        decode_sorted(torch.tensor(code, dtype=torch.uint8), count)


def test_another_dtype_is_damage() -> None:
    with pytest.raises(ConfigError, match="float32"):
        decode_sorted(torch.zeros(3), 3)
