"""Draw random numbers that depend only on a seed, counters and a position: the same on every device.

Numbers are never stored. Any stretch of them can be drawn independently, in any order, on any process. The
bits come from Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011),
computed with integer operations of torch. Normal numbers are made from them by the transform of Box and
Muller in float32. Its additions, multiplications, divisions and square roots are rounded as IEEE 754 says, so
they give the same bits everywhere. The logarithm, the sine and the cosine are polynomials, since every
library rounds its own ones differently.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # what is added to the key after each round
ROUNDS = 10
WORDS = 4  # words of 32 bits in one block
MASK = 0xFFFFFFFF
CHUNK = {"cpu": 2**16}  # numbers drawn together, by device type: the temporaries stay in cache
CHUNK_ELSEWHERE = 2**24

# Coefficients of polynomials in the square: log(m) = s (2 + 2/3 s^2 + ...) with s = (m - 1) / (m + 1).
LOGARITHM = [2 / k for k in range(1, 13, 2)]
SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(5)]
COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(6)]


def seed_for(seed: int, name: str) -> int:
    """Return a seed of 64 bits for the numbers called ``name`` in a run with ``seed``."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> list[Tensor | int]:
    """Return the four words that Philox-4x32-10 makes of a counter of four words and a key of two.

    A word is an integer from 0 to 2**32 - 1, in int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # Multiplication of int64 wraps around, which leaves the 64 bits of the unsigned product.
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((right >> 32) & MASK) ^ c1 ^ k0, right & MASK
        c2, c3 = ((left >> 32) & MASK) ^ c3 ^ k1, left & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def draw_words(
    start: int, stop: int, seed: int, *counters: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the words ``start`` to ``stop`` of a stream, int64 from 0 to 2**32 - 1.

    ``seed`` (64 bits) and up to two ``counters`` (32 bits each) choose the stream.
    """
    first, last = start // WORDS, -(-stop // WORDS)
    words = torch.stack(_draw_blocks(first, last, seed, counters, device), -1).view(-1)
    return words[start - first * WORDS : stop - first * WORDS]


def draw_normal(
    start: int, stop: int, seed: int, *counters: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the normal numbers ``start`` to ``stop`` of a stream, float32 with mean 0 and variance 1.

    None is larger than 6.7 in magnitude. The stream is chosen as in ``draw_words``.
    """
    first, last = start // WORDS, -(-stop // WORDS)
    a, b, c, d = _draw_blocks(first, last, seed, counters, device)
    one, two = _box_muller(torch.stack([a, c], -1), torch.stack([b, d], -1))
    numbers = torch.stack([one, two], -1).view(-1)
    return numbers[start - first * WORDS : stop - first * WORDS]


def normal_chunks(
    count: int, seed: int, *counters: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the first ``count`` normal numbers of a stream, chunk by chunk, each with its place."""
    for place in chunk_places(count, device):
        yield place, draw_normal(place.start, place.stop, seed, *counters, device=device)


def chunk_places(count: int, device: torch.device | str) -> Iterator[slice]:
    """Yield the slices that divide ``count`` numbers into the chunks for ``device``."""
    size = CHUNK.get(torch.device(device).type, CHUNK_ELSEWHERE)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def normal(
    shape: Sequence[int],
    seed: int,
    *counters: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return a tensor that holds the first normal numbers of a stream, in row-major order."""
    found = torch.empty(math.prod(shape), device=device, dtype=dtype)
    for place, chunk in normal_chunks(len(found), seed, *counters, device=device):
        found[place] = chunk.to(dtype)
    return found.view(*shape)


def _draw_blocks(
    first: int, last: int, seed: int, counters: Sequence[int], device: torch.device | str
) -> list[Tensor]:
    """Return the four words of each block from ``first`` to ``last``."""
    block = torch.arange(first, last, device=device)
    c2, c3 = (*counters, 0, 0)[:2]
    words = philox([block & MASK, block >> 32, c2, c3], (seed & MASK, (seed >> 32) & MASK))
    return [word for word in words if isinstance(word, Tensor)]


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent normal numbers, float32, for each pair of words."""
    # Some libraries misround square roots in float32. A root in float64 that is off by its last bit still
    # rounds to the right float32: no root of 24 bits lies that close to the middle between two of them.
    r = _log_of_share(radius).mul_(-2).double().sqrt_().float()
    # The upper two bits are the quadrant; the others are an angle from -pi/4 to pi/4 around its middle.
    quadrant = angle >> 30
    phi = ((angle & (2**30 - 1)) - 2**29).float().mul_(math.pi / 4 / 2**29)
    square = phi * phi
    sine, cosine = _polynomial(square, SINE).mul_(phi), _polynomial(square, COSINE)
    swapped = (quadrant & 1).bool()
    x, y = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    x.mul_(1 - 2 * (((quadrant + 1) >> 1) & 1))
    y.mul_(1 - 2 * (quadrant >> 1))
    return x.mul_(r), y.mul_(r)


def _log_of_share(words: Tensor) -> Tensor:
    """Return log((word + 1) / 2**32), float32."""
    bits = (words + 1).float().view(torch.int32)
    exponent = (bits >> 23) - (127 + 32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)  # from 1 to 2
    high = mantissa > math.sqrt(2)
    mantissa = torch.where(high, mantissa * 0.5, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    return _polynomial(s * s, LOGARITHM).mul_(s).add_((exponent + high).float().mul_(math.log(2)))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return the sum of ``coefficients[k] * x**k``, by Horner's rule and without fused multiply-adds."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total.mul_(x).add_(coefficient)
    return total
