"""Counter-based random numbers against published vectors, plain Python and the normal distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from finetune.core import seeded

# Known answers of the authors' library Random123: counter, key, words.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    k0, k1 = numbers(key)
    found = seeded.philox([torch.tensor([word]) for word in numbers(counter)], (k0, k1))
    assert [int(word) for word in found] == numbers(words)


def test_a_stream_is_philox_of_its_seed_counters_and_position() -> None:
    seed, step, draw = 0xA4093822299F31D0, 7, 2**32 - 1
    words = seeded.draw_words(0, 40, seed, step, draw).tolist()
    for block in range(10):  # plain integers of Python, which have no overflow
        wanted = seeded.philox([block, 0, step, draw], (seed & 0xFFFFFFFF, seed >> 32))
        assert words[4 * block : 4 * block + 4] == wanted


def test_positions_beyond_32_bits_use_the_second_counter_word() -> None:
    block = 2**32 + 5
    wanted = seeded.philox([5, 1, 0, 0], (3, 0))
    assert seeded.draw_words(4 * block, 4 * block + 4, 3).tolist() == wanted


def test_normal_numbers_are_the_transform_of_box_and_muller() -> None:
    words = seeded.draw_words(0, 40_000, 5, 6).double()
    u, v = (words[0::2] + 1) / 2**32, words[1::2] / 2**32
    # Angles are turned by an eighth of a circle, so that quadrants have their middles on the axes.
    r, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v - math.pi / 4
    wanted = torch.stack([r * torch.cos(angle), r * torch.sin(angle)], -1).view(-1)
    found = seeded.draw_normal(0, 40_000, 5, 6).double()
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)


def test_the_ends_of_the_range_are_finite() -> None:
    ends = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    radius, angle = torch.meshgrid(ends, ends, indexing="ij")
    for found in seeded._box_muller(radius, angle):
        assert found.isfinite().all()
        assert float(found.abs().max()) < 6.7


def test_the_numbers_are_standard_normal_and_uncorrelated() -> None:
    n = 400_000
    z = seeded.normal((n,), 11, dtype=torch.float64)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        values = z**power
        error = float(values.mean() - moment) / float(values.std() / math.sqrt(n))
        assert abs(error) < 4, power
    uniform = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    distance = (uniform - torch.arange(n, dtype=torch.float64) / n).abs().max()
    assert float(distance) * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov at 0.1 %
    for other in (z.roll(1), z.roll(2), z.roll(4), seeded.normal((n,), 12), seeded.normal((n,), 11, 1)):
        assert abs(float((z * other).mean())) < 4 / math.sqrt(n)


def test_any_stretch_can_be_drawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seeded.normal((7, 9), 3, 4, 5).view(-1)
    for start, stop in ((0, 1), (1, 3), (5, 63), (8, 12), (62, 63), (9, 9)):
        assert torch.equal(seeded.draw_normal(start, stop, 3, 4, 5), whole[start:stop])
    monkeypatch.setitem(seeded.CHUNK, "cpu", 10)  # not a multiple of a block
    assert torch.equal(seeded.normal((7, 9), 3, 4, 5).view(-1), whole)


def test_streams_differ_by_seed_counter_and_name() -> None:
    named = [(seeded.seed_for(1, name),) for name in ("a", "b")]
    streams = [(1,), (2,), (1, 1), (1, 0, 1), (1 + 2**32,), *named]
    found = {tuple(seeded.draw_words(0, 8, *stream).tolist()) for stream in streams}
    assert len(found) == len(streams)
    assert seeded.seed_for(0, "head.weight") == 9085721122274230816


def test_numpy_computes_the_same_bits() -> None:
    """The steps of the transform, one rounding each, in a library with kernels of its own."""
    words = seeded.draw_words(0, 20_000, 1, 2, 3).numpy()
    x = (words[0::2] + 1).astype(np.float32)
    mantissa, exponent = np.frexp(x)  # from 1/2 to 1
    low = mantissa + mantissa <= np.float32(math.sqrt(2))
    mantissa = np.where(low, mantissa + mantissa, mantissa)
    s = (mantissa - np.float32(1)) / (mantissa + np.float32(1))
    logarithm = horner(s * s, seeded.LOGARITHM) * s
    logarithm = logarithm + (exponent - 32 - low).astype(np.float32) * np.float32(math.log(2))
    r = np.sqrt(logarithm * np.float32(-2))
    quadrant, inside = np.divmod(words[1::2], 2**30)
    phi = (inside - 2**29).astype(np.float32) * np.float32(math.pi / 4 / 2**29)
    sine, cosine = horner(phi * phi, seeded.SINE) * phi, horner(phi * phi, seeded.COSINE)
    turned = {0: (cosine, sine), 1: (-sine, cosine), 2: (-cosine, -sine), 3: (sine, -cosine)}
    wanted = np.empty(20_000, np.float32)
    for number, (one, two) in turned.items():
        here = quadrant == number
        wanted[0::2][here], wanted[1::2][here] = (one * r)[here], (two * r)[here]
    assert np.array_equal(seeded.draw_normal(0, 20_000, 1, 2, 3).numpy(), wanted)


def horner(x: Any, coefficients: list[float]) -> Any:
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + np.float32(coefficient)
    return total


def test_the_bits_of_the_numbers_are_fixed() -> None:
    """They must not change from one machine or version to the next: logs of runs refer to them."""
    bits = seeded.normal((1000,), 1, 2, 3).view(torch.int32).long()
    assert int((bits * torch.arange(1000)).sum()) == -9925517405469


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits() -> None:
    for device_first in (1, 123_457):
        cpu, gpu = (seeded.draw_normal(device_first, 3_000_000, 9, 8, device=d) for d in ("cpu", "cuda"))
        assert torch.equal(cpu, gpu.cpu())
