"""Pure functions for comparing predictors and methods: of counts, scores or differences; random only where a seed is given.

Distributions are scipy.special's: scipy.stats and statsmodels give the same numbers, which the tests check, and take longer to import than a
thousand runs take to compare. Two kinds of claim are kept apart. *Fixed predictors*: McNemar, Cochran's Q and the bootstrap ask whether these very
trained models differ on new examples. *Methods*: the tests over seeds or splits ask whether training again would give the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Sums = tuple[ArrayLike, ArrayLike]
KEPT = 8_000_000  # draws of the bootstrap held at once


class Estimate(NamedTuple):
    """A difference with its two-sided p-value and 95 % interval; ``p`` is ``None`` where the data allow no test."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


class FiveByTwo(NamedTuple):
    """Dietterich's t (5 degrees of freedom) and Alpaydin's F (10 and 5), each with its p-value."""

    t: float
    t_p: float
    f: float
    f_p: float


def _two_sided(t: float, df: float) -> float:
    from scipy.special import ndtr, stdtr

    return float(2 * (ndtr(-abs(t)) if math.isinf(df) else stdtr(df, -abs(t))))


def _quantile(df: float, level: float) -> float:
    from scipy.special import ndtri, stdtrit

    return float(ndtri((1 + level) / 2) if math.isinf(df) else stdtrit(df, (1 + level) / 2))


def _of_t(difference: float, error: float, df: float, level: float = 0.95) -> Estimate:
    """From a standard error; without any error, equal is certain and anything else has no test."""
    if not error > 1e-12 * abs(difference):  # less is rounding
        return Estimate(difference, None, None, 1.0 if difference == 0 else None)
    reach = _quantile(df, level) * error
    return Estimate(difference, difference - reach, difference + reach, _two_sided(difference / error, df))


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share of ``n`` examples."""
    from scipy.special import ndtri

    z2, p = float(ndtri((1 + level) / 2)) ** 2, right / n
    middle, reach = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) + z2 / (4 * n)) / n)
    low, high = (middle - reach) / (1 + z2 / n), (middle + reach) / (1 + z2 / n)
    return (0.0 if right == 0 else low), (1.0 if right == n else high)


def mcnemar_exact(b: int, c: int) -> float:
    """p of ``b`` examples that only the first gets right against ``c`` that only the second does."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def mcnemar_midp(b: int, c: int) -> float:
    """The exact p less the probability of what was seen: less conservative, and still at its level."""
    from scipy.special import gammaln

    n, k = b + c, min(b, c)
    if b == c:
        return 1.0
    seen = math.exp(float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) - n * math.log(2))
    return min(1.0, max(0.0, _doubled(k, n) - seen))


def _doubled(k: int, n: int) -> float:
    from scipy.special import bdtr

    return 2 * float(bdtr(k, n, 0.5))


def mcnemar_chi2(b: int, c: int, corrected: bool = False) -> tuple[float, float]:
    """The asymptotic statistic and its p, for 25 or more examples on which the two differ."""
    from scipy.special import chdtrc

    if b + c == 0:
        return 0.0, 1.0
    chi2 = (max(abs(b - c) - 1, 0) if corrected else abs(b - c)) ** 2 / (b + c)
    return chi2, float(chdtrc(1, chi2))


def cochran_q(correct: ArrayLike) -> tuple[float, int, float]:
    """Q, its degrees of freedom and p, of a matrix [examples, models] of 0 and 1."""
    from scipy.special import chdtrc

    x = np.asarray(correct, dtype=float)
    models = x.shape[1]
    totals, rows = x.sum(0), x.sum(1)
    below = models * rows.sum() - (rows**2).sum()
    if below == 0:
        return 0.0, models - 1, 1.0
    q = float((models - 1) * (models * (totals**2).sum() - totals.sum() ** 2) / below)
    return q, models - 1, float(chdtrc(models - 1, q))


def five_by_two(differences: ArrayLike) -> FiveByTwo:
    """The tests of five halvings: ``differences`` [5, 2], trained on one half and then on the other.

    Raises ``ValueError`` for another shape, or where the differences of every halving are equal but not zero.
    """
    from scipy.special import fdtrc

    d = np.asarray(differences, dtype=float)
    if d.shape != (5, 2):
        raise ValueError(f"five halvings of two differences are needed, not {d.shape}")
    if not d.any():
        return FiveByTwo(0.0, 1.0, 0.0, 1.0)
    squares = float(((d - d.mean(1, keepdims=True)) ** 2).sum())
    if squares == 0:
        raise ValueError("the differences of each halving are equal, so there is no variance to test against")
    t, f = float(d[0, 0]) / math.sqrt(squares / 5), float((d**2).sum()) / (2 * squares)
    return FiveByTwo(t, _two_sided(t, 5), f, float(fdtrc(10, 5, f)))


def corrected_t(differences: Sequence[float], ratio: float) -> Estimate:
    """Nadeau and Bengio's t over repeated splits; ``ratio`` is test examples per training example, 0 for independent repetitions."""
    count = len(differences)
    variance = float(np.var(differences, ddof=1))
    return _of_t(float(np.mean(differences)), math.sqrt((1 / count + ratio) * variance), count - 1)


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Of the means of two independent groups with variances of their own; two or more values each."""
    parts = [float(np.var(x, ddof=1)) / len(x) for x in (a, b)]
    below = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    return _of_t(
        float(np.mean(a) - np.mean(b)), math.sqrt(sum(parts)), sum(parts) ** 2 / below if below else math.inf
    )


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The interval of a mean over seeds; ``None`` for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = _quantile(len(values) - 1, level) * error
    return mean - reach, mean + reach


def crossed(differences: ArrayLike, level: float = 0.95) -> Estimate:
    """The mean of ``differences`` [seeds, examples], both taken as drawn at random: would new seeds on new examples agree?

    The two-way random-effects variance with Hillis's degrees of freedom, as used where several readers judge the same cases. Two seeds say so little
    of how seeds vary that they get one degree of freedom. Two or more of both.
    """
    d = np.asarray(differences, dtype=float)
    seeds, n = d.shape
    mean, by_seed, by_example = float(d.mean()), d.mean(1), d.mean(0)
    ms_seed = n * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    ms_example = seeds * float(((by_example - mean) ** 2).sum()) / (n - 1)
    rest = d - by_seed[:, None] - by_example[None] + mean
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (n - 1))
    total = ms_seed + max(ms_example - ms_rest, 0.0)
    df = total**2 / (ms_seed**2 / (seeds - 1)) if ms_seed > 0 else math.inf
    return _of_t(mean, math.sqrt(total / (seeds * n)), 1.0 if seeds == 2 else df, level)


def linearised(above: ArrayLike, below: ArrayLike) -> Array:
    """Values by example whose mean is the ratio of sums ``above`` / ``below`` and which vary as that ratio does."""
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    ratio = a.sum() / b.sum()
    values: Array = ratio + (a - ratio * b) / b.mean()
    return values


def paired_bootstrap(first: Sums, second: Sums, draws: int | None = None, seed: int = 0) -> Estimate:
    """The difference of two ratios of sums over the same examples, for example of bits and bytes.

    Examples are drawn with replacement, the same ones for both. The interval is that of percentiles, and p the level at which it meets zero.
    """
    columns = np.stack([np.asarray(x, dtype=float) for x in (*first, *second)], axis=1)
    n = len(columns)
    sums = np.concatenate(
        [counts @ columns for counts in _counts(n, draws or min(10_000, max(1000, 100_000_000 // n)), seed)]
    )
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold no bytes at all
        found = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    a, b, c, d = columns.sum(0)
    return _percentiles(float(a / b - c / d), found[np.isfinite(found)])


def bootstrap_counts(b: int, c: int, n: int, draws: int = 10_000, seed: int = 0) -> Estimate:
    """The same for two accuracies: of ``n`` examples only the first gets ``b`` right and only the second ``c``."""
    drawn = np.random.default_rng(seed).multinomial(n, [b / n, c / n, max(0.0, 1 - (b + c) / n)], draws)
    return _percentiles((b - c) / n, (drawn[:, 0] - drawn[:, 1]) / n)


def _percentiles(difference: float, found: Array) -> Estimate:
    low, high = (float(x) for x in np.quantile(found, [0.025, 0.975]))
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return Estimate(difference, low, high, min(1.0, 2 * (tail + 1) / (len(found) + 1)))


def _counts(n: int, draws: int, seed: int) -> Iterator[NDArray[Any]]:
    """How often each of ``n`` examples is drawn, [some draws, n] at a time; kept for the next pair where it is small."""
    if n * draws <= KEPT:
        yield _kept(n, draws, seed)
        return
    random, size = np.random.default_rng(seed), max(1, KEPT // n)
    for start in range(0, draws, size):
        yield _drawn(random, n, min(size, draws - start))


@lru_cache(maxsize=2)
def _kept(n: int, draws: int, seed: int) -> NDArray[Any]:
    return _drawn(np.random.default_rng(seed), n, draws)


def _drawn(random: np.random.Generator, n: int, draws: int) -> NDArray[Any]:
    places = random.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(places.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float32)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values in the order given; what has no p takes no part."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


def ranks(values: ArrayLike) -> Array:
    """The ranks in each row of ``values``, 1 for the smallest; equal values share the mean of theirs."""
    x = np.asarray(values, dtype=float)
    below = (x[:, None, :] < x[:, :, None]).sum(2)
    equal = (x[:, None, :] == x[:, :, None]).sum(2)
    found: Array = below + (equal + 1) / 2
    return found


def friedman(values: ArrayLike) -> tuple[float, float, Array]:
    """The statistic, corrected for ties, its p, and the mean rank of each column of ``values`` [blocks, treatments]; the smallest has rank 1."""
    from scipy.special import chdtrc

    found = ranks(values)
    blocks, k = found.shape
    means: Array = found.mean(0)
    spread = float((found**2).sum()) - blocks * k * (k + 1) ** 2 / 4
    if spread == 0:
        return 0.0, 1.0, means
    chi2 = (k - 1) * blocks**2 * float(((means - (k + 1) / 2) ** 2).sum()) / spread
    return chi2, float(chdtrc(k - 1, chi2)), means


def critical_difference(treatments: int, blocks: int, level: float = 0.95) -> float:
    """Nemenyi's: mean ranks that lie further apart than this differ."""
    return (
        studentized_range(treatments, level)
        / math.sqrt(2)
        * math.sqrt(treatments * (treatments + 1) / (6 * blocks))
    )


def studentized_range(groups: int, level: float = 0.95) -> float:
    """The quantile of the range of ``groups`` standard normal values."""
    from scipy.special import ndtr

    x = np.linspace(-8, 8, 2001)
    density = groups * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])

    low, high = 0.0, 20.0
    for _ in range(60):
        q = (low + high) / 2
        below = float((density * (ndtr(x + q) - ndtr(x)) ** (groups - 1)).sum())  # the smallest lies at x
        low, high = (q, high) if below < level else (low, q)
    return (low + high) / 2


def cliques(mean_ranks: Sequence[float], cd: float) -> list[list[int]]:
    """The largest sets of treatments whose mean ranks lie within ``cd``, by rank; none holds another, and one alone is none."""
    order = sorted(range(len(mean_ranks)), key=lambda i: mean_ranks[i])
    found: list[list[int]] = []
    last = 0  # the end of the clique before
    for start in range(len(order)):
        end = start
        while end < len(order) and mean_ranks[order[end]] - mean_ranks[order[start]] <= cd:
            end += 1
        if end - start > 1 and end > last:
            found.append(order[start:end])
            last = end
    return found
