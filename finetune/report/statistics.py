"""Statistical tests and intervals, as pure functions of counts, values or differences.

Only functions with a ``seed`` argument draw random numbers. The tests support two kinds of claim:

* *Fixed predictors*: McNemar's test, Cochran's Q and the bootstrap ask whether these trained models differ on
  new examples.
* *Methods*: the tests over seeds or splits ask whether training again would give the same order.

Distributions come from ``scipy.special``, because importing ``scipy.stats`` or ``statsmodels`` takes longer
than comparing a thousand runs. The tests check that the numbers agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Sums = tuple[ArrayLike, ArrayLike]  # numerator and denominator of a ratio, by example
CACHED = 8_000_000  # counts of the bootstrap that are in memory at once


class Estimate(NamedTuple):
    """A difference with its 95 % interval and two-sided p-value; ``p`` is None if the data allow no test."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


class FiveByTwo(NamedTuple):
    """Dietterich's t (5 degrees of freedom) and Alpaydin's F (10 and 5), each with its p-value.

    Dietterich (1998), "Approximate statistical tests for comparing supervised classification learning
    algorithms"; Alpaydin (1999), "Combined 5x2 cv F test for comparing supervised classification learning
    algorithms".
    """

    t: float
    t_p: float
    f: float
    f_p: float


def _t_p_value(t: float, df: float) -> float:
    """Return the two-sided p-value of Student's t; infinitely many degrees of freedom mean the normal."""
    from scipy.special import ndtr, stdtr

    if math.isinf(df):
        return float(2 * ndtr(-abs(t)))
    return float(2 * stdtr(df, -abs(t)))


def _t_quantile(df: float, level: float) -> float:
    """Return the quantile of Student's t that bounds a two-sided interval."""
    from scipy.special import ndtri, stdtrit

    if math.isinf(df):
        return float(ndtri((1 + level) / 2))
    return float(stdtrit(df, (1 + level) / 2))


def _t_estimate(difference: float, error: float, df: float, level: float = 0.95) -> Estimate:
    """Return the estimate for a difference with a standard error.

    If the standard error is 0, a difference of 0 has p = 1, and any other difference has no test.
    """
    if not error > 1e-12 * abs(difference):  # a smaller one comes from rounding
        return Estimate(difference, None, None, 1.0 if difference == 0 else None)
    reach = _t_quantile(df, level) * error
    return Estimate(difference, difference - reach, difference + reach, _t_p_value(difference / error, df))


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for the share ``right / n``."""
    from scipy.special import ndtri

    z2, p = float(ndtri((1 + level) / 2)) ** 2, right / n
    middle, reach = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) + z2 / (4 * n)) / n)
    low, high = (middle - reach) / (1 + z2 / n), (middle + reach) / (1 + z2 / n)
    if right == 0:
        low = 0.0
    if right == n:
        high = 1.0
    return low, high


def mcnemar_midp(b: int, c: int) -> float:
    """Return the mid-p value of McNemar's test.

    It is the exact p-value minus the probability of the observed counts. It is less conservative than the
    exact test and still rarely exceeds its level (Fagerland et al., 2013).
    """
    from scipy.special import bdtr, gammaln

    n, k = b + c, min(b, c)
    if b == c:
        return 1.0
    seen = math.exp(float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) - n * math.log(2))
    return min(1.0, max(0.0, 2 * float(bdtr(k, n, 0.5)) - seen))


def cochran_q(correct: ArrayLike) -> tuple[float, int, float]:
    """Return Cochran's Q, its degrees of freedom and its p-value for a 0/1 matrix [examples, models]."""
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
    """Return the tests of five halvings of the data.

    ``differences`` [5, 2] holds, for each halving, the difference after training on one half and on the
    other. Raises ``ValueError`` for another shape, or if the two differences of every halving are equal but
    not all zero.
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
    return FiveByTwo(t, _t_p_value(t, 5), f, float(fdtrc(10, 5, f)))


def corrected_t(differences: Sequence[float], ratio: float) -> Estimate:
    """Return the corrected t test over repeated splits.

    Nadeau and Bengio (2003), "Inference for the generalization error". ``ratio`` is the number of test
    examples per training example; 0 for independent repetitions, which gives the paired t test.
    """
    count = len(differences)
    variance = float(np.var(differences, ddof=1))
    return _t_estimate(float(np.mean(differences)), math.sqrt((1 / count + ratio) * variance), count - 1)


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return Welch's t test of the means of two independent groups, with at least two values each."""
    error_a, error_b = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    total = error_a + error_b
    below = error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1)
    df = total**2 / below if below else math.inf
    return _t_estimate(float(np.mean(a) - np.mean(b)), math.sqrt(total), df)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's interval of the mean of ``values``; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = _t_quantile(len(values) - 1, level) * error
    return mean - reach, mean + reach


def crossed(differences: ArrayLike, level: float = 0.95) -> Estimate:
    """Test the mean of ``differences`` [seeds, examples], with seeds and examples both drawn at random.

    The result holds for new seeds on new examples. The variance is that of two-way random effects with
    Hillis's degrees of freedom (2007), as used for several readers who judge the same cases. Two seeds get
    one degree of freedom, because they say little about the variance between seeds. At least two seeds and
    two examples are needed.
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
    return _t_estimate(mean, math.sqrt(total / (seeds * n)), 1.0 if seeds == 2 else df, level)


def linearised(above: ArrayLike, below: ArrayLike) -> Array:
    """Linearise the ratio of sums ``above`` / ``below``.

    Returns one value for each example. The mean of these values is the ratio, and their variance gives the
    variance of the ratio (delta method).
    """
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    ratio = a.sum() / b.sum()
    values: Array = ratio + (a - ratio * b) / b.mean()
    return values


def paired_bootstrap(first: Sums, second: Sums, draws: int | None = None, seed: int = 0) -> Estimate:
    """Return the difference of two ratios of sums over the same examples, such as bits per byte.

    Each resample draws examples with replacement and uses the same ones for both ratios. The interval is a
    percentile interval, and p is the level at which it reaches zero.
    """
    columns = np.stack([np.asarray(x, dtype=float) for x in (*first, *second)], axis=1)
    n = len(columns)
    if not draws:
        draws = min(10_000, max(1000, 100_000_000 // n))
    sums = np.concatenate([counts @ columns for counts in _draw_counts(n, draws, seed)])
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may contain no bytes at all
        found = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    a, b, c, d = columns.sum(0)
    return _percentiles(float(a / b - c / d), found[np.isfinite(found)])


def bootstrap_counts(b: int, c: int, n: int, draws: int = 10_000, seed: int = 0) -> Estimate:
    """Return the paired bootstrap of two accuracies.

    Of ``n`` examples, ``b`` are right in the first model only, and ``c`` in the second only.
    """
    drawn = np.random.default_rng(seed).multinomial(n, [b / n, c / n, max(0.0, 1 - (b + c) / n)], draws)
    return _percentiles((b - c) / n, (drawn[:, 0] - drawn[:, 1]) / n)


def _percentiles(difference: float, found: Array) -> Estimate:
    low, high = (float(x) for x in np.quantile(found, [0.025, 0.975]))
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return Estimate(difference, low, high, min(1.0, 2 * (tail + 1) / (len(found) + 1)))


def _draw_counts(n: int, draws: int, seed: int) -> Iterator[NDArray[Any]]:
    """Yield how often each of ``n`` examples is drawn, in chunks of shape [draws, n].

    A small result is cached, because the next pair of rows usually has the same number of examples.
    """
    if n * draws <= CACHED:
        yield _draw_all_counts(n, draws, seed)
        return
    random, size = np.random.default_rng(seed), max(1, CACHED // n)
    for start in range(0, draws, size):
        yield _draw_some_counts(random, n, min(size, draws - start))


@lru_cache(maxsize=2)
def _draw_all_counts(n: int, draws: int, seed: int) -> NDArray[Any]:
    return _draw_some_counts(np.random.default_rng(seed), n, draws)


def _draw_some_counts(random: np.random.Generator, n: int, draws: int) -> NDArray[Any]:
    places = random.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(places.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float32)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p-values in the order given; None stays None and does not count as a test."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


def ranks(values: ArrayLike) -> Array:
    """Return the ranks within each row of ``values``, 1 for the smallest; ties share their mean rank."""
    x = np.asarray(values, dtype=float)
    below = (x[:, None, :] < x[:, :, None]).sum(2)
    equal = (x[:, None, :] == x[:, :, None]).sum(2)
    found: Array = below + (equal + 1) / 2
    return found


def friedman(values: ArrayLike) -> tuple[float, float, Array]:
    """Return Friedman's statistic, corrected for ties, its p-value, and the mean rank of each treatment.

    ``values`` is [blocks, treatments]; the smallest value of a block has rank 1.
    """
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
    """Return Nemenyi's critical difference: mean ranks that are further apart than this differ."""
    spread = math.sqrt(treatments * (treatments + 1) / (6 * blocks))
    return studentized_range(treatments, level) / math.sqrt(2) * spread


def studentized_range(groups: int, level: float = 0.95) -> float:
    """Return the quantile of the range of ``groups`` standard normal values, by bisection."""
    from scipy.special import ndtr

    x = np.linspace(-8, 8, 2001)
    density = groups * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    low, high = 0.0, 20.0
    for _ in range(60):
        q = (low + high) / 2
        # Integrate over x, the smallest value: all others lie between x and x + q.
        below = float((density * (ndtr(x + q) - ndtr(x)) ** (groups - 1)).sum())
        if below < level:
            low = q
        else:
            high = q
    return (low + high) / 2


def cliques(mean_ranks: Sequence[float], cd: float) -> list[list[int]]:
    """Return the maximal sets of at least two treatments whose mean ranks lie within ``cd``, by rank."""
    order = sorted(range(len(mean_ranks)), key=lambda i: mean_ranks[i])
    found: list[list[int]] = []
    last = 0  # the end of the previous clique
    for start in range(len(order)):
        end = start
        while end < len(order) and mean_ranks[order[end]] - mean_ranks[order[start]] <= cd:
            end += 1
        if end - start > 1 and end > last:
            found.append(order[start:end])
            last = end
    return found
