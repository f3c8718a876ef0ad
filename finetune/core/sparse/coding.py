"""Code sorted indices as bytes: the gap to the previous index in LEB128.

Each byte of a gap holds seven of its bits, low bits first. The high bit is set on all bytes but the last.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError

LONGEST = 9  # bytes of a gap: 63 bits, as many as a non-negative int64 has


def encode_sorted(index: Tensor) -> Tensor:
    """Return the code, uint8, of ``index`` [count]: integers, ascending, not negative.

    A gap below 128 takes one byte. Raises ``ValueError`` for another shape, dtype or order.
    """
    if index.dim() != 1 or index.is_floating_point() or index.is_complex():
        raise ValueError(
            f"indices must be a vector of integers, not {index.dtype} of shape {tuple(index.shape)}"
        )
    values = index.detach().cpu().numpy().astype(np.int64, copy=False)
    gaps = np.diff(values, prepend=np.int64(0)).astype(np.int64, copy=False)
    if (gaps < 0).any():
        raise ValueError("indices must ascend and must not be negative")
    size = np.ones(len(gaps), np.int64)
    longest = max(1, -(-int(gaps.max(initial=0)).bit_length() // 7))
    for count in range(1, longest):
        size += gaps >> (7 * count) > 0
    start = np.cumsum(size) - size
    code = np.empty(int(size.sum()), np.uint8)
    for place in range(longest):
        here = size > place
        goes_on = np.where(size[here] > place + 1, 128, 0)
        code[start[here] + place] = (gaps[here] >> (7 * place) & 127) | goes_on
    return torch.from_numpy(code)


def expected_bytes(count: int, size: int, neighbours: int) -> int:
    """Return the expected length of the code of ``count`` indices below ``size``.

    The indices are assumed to lie in random runs of ``neighbours``. Each gap takes one byte, and one more for
    each of 128, 128^2, ... that it reaches.
    """
    if count >= size:
        return count
    share_unused = 1 - count / size
    longer: float = sum(share_unused ** ((128**j - 1) / neighbours) for j in range(1, 5))
    return count + math.ceil(count / neighbours * longer)


def decode_sorted(code: Tensor, count: int) -> Tensor:
    """Return the ``count`` indices, int64, that ``encode_sorted`` turned into ``code``.

    Raises ``ConfigError`` for bytes that ``encode_sorted`` cannot have made: cut short, too many or too few,
    or beyond int64.
    """
    data = code.detach().cpu().numpy()
    if data.ndim != 1 or data.dtype != np.uint8:
        raise _damaged(f"the code is {data.dtype} of shape {data.shape}, not a vector of bytes")
    stop = np.flatnonzero(data < 128) + 1
    if len(stop) != count or (len(data) and data[-1] >= 128):
        raise _damaged(f"{len(data)} bytes hold {len(stop)} whole indices instead of {count}")
    size = np.diff(stop, prepend=0)
    if (size > LONGEST).any() or ((size > 1) & (data[stop - 1] == 0)).any():
        raise _damaged("a gap is written with too many bytes")
    index = np.cumsum(_gaps(data, stop - size, size))
    if (index < 0).any():
        raise _damaged("an index is beyond 63 bits")
    return torch.from_numpy(index)


def _gaps(
    data: np.ndarray[Any, np.dtype[np.uint8]], start: Any, size: Any
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Decode the numbers that start at ``start`` in ``data`` and are ``size`` bytes long."""
    gaps = np.zeros(len(size), np.int64)
    for place in range(int(size.max(initial=0))):
        here = size > place
        gaps[here] |= (data[start[here] + place].astype(np.int64) & 127) << (7 * place)
    return gaps


def _damaged(fault: str) -> ConfigError:
    """Make the error for a damaged code."""
    return ConfigError(
        f"The stored indices are damaged: {fault}. Copy the delta again from where it was trained, "
        "or train it again."
    )
