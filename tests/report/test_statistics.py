"""Statistics against worked examples, other libraries and brute force, and invariants for any input."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import cochrans_q, mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from finetune.report import statistics as ours

COUNTS = st.integers(0, 60)
FIRST = [
    [int(x) for x in row] for row in ["1011", "0111", "1110", "0100", "0100", "1010", "0100", "1111", "0100"]
]
SECOND = [
    [int(x) for x in row]
    for row in ["00110", "01010", "01101", "10001", "11000", "10100", "01000", "00110", "00000"]
]
HALVES = [(0.02, 0.03), (0.01, 0.04), (0.03, 0.01), (0.02, 0.02), (0.0, 0.03)]


def test_wilson_of_170_in_200() -> None:
    assert ours.wilson(170, 200) == pytest.approx((0.79394, 0.89286), abs=5e-6)


@given(st.integers(1, 500), st.data())
def test_wilson_as_statsmodels(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    assert ours.wilson(right, n) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize(
    ("b", "c", "midp"),
    [(1, 8, 11 / 512), (10, 25, 0.0113310), (0, 5, 0.03125), (3, 3, 1), (0, 0, 1)],
)
def test_mcnemar_worked(b: int, c: int, midp: float) -> None:
    assert ours.mcnemar_midp(b, c) == pytest.approx(midp, rel=5e-6)


@given(COUNTS, COUNTS)
def test_mcnemar_as_a_sum(b: int, c: int) -> None:
    n, k = b + c, min(b, c)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    expected = 1.0 if b == c else (2 * tail - math.comb(n, k)) / 2**n
    assert ours.mcnemar_midp(b, c) == pytest.approx(min(1, expected), rel=1e-9)


@given(COUNTS, COUNTS)
def test_mcnemar_invariants(b: int, c: int) -> None:
    assert ours.mcnemar_midp(b, c) == ours.mcnemar_midp(c, b)
    if b + c:
        assert ours.mcnemar_midp(b, c) <= mcnemar([[0, b], [c, 0]], exact=True).pvalue + 1e-12
    assert ours.mcnemar_midp(b, c) > 0.05 or b + c >= 5


def test_cochran_worked() -> None:
    assert ours.cochran_q(FIRST) == pytest.approx((4.2, 3, 0.240662), rel=1e-5)
    assert ours.cochran_q(SECOND) == pytest.approx((1.217391, 4, 0.875227), rel=1e-5)
    two = np.array(FIRST)[:, :2]
    assert ours.cochran_q(two)[0] == pytest.approx(9 / 7)
    assert ours.cochran_q([[0, 0, 0], [1, 1, 1]]) == (0.0, 2, 1.0)


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 4), min_size=1, max_size=40), st.permutations(range(4)))
def test_cochran_invariants(rows: list[tuple[int, ...]], order: list[int]) -> None:
    x = np.array(rows)
    q, _, p = ours.cochran_q(x)
    assert ours.cochran_q(x[:, order])[0] == pytest.approx(q)
    assert ours.cochran_q(np.vstack([x, np.ones((3, 4)), np.zeros((2, 4))]))[0] == pytest.approx(q)
    if any(len(set(row)) > 1 for row in rows):
        assert (q, p) == pytest.approx((float(cochrans_q(x).statistic), float(cochrans_q(x).pvalue)))
    b, c = int((x[:, 0] > x[:, 1]).sum()), int((x[:, 0] < x[:, 1]).sum())
    chi2 = mcnemar([[0, b], [c, 0]], exact=False, correction=False).statistic if b + c else 0.0
    assert ours.cochran_q(x[:, :2])[0] == pytest.approx(chi2)


def test_five_by_two_worked() -> None:
    assert ours.five_by_two(HALVES) == pytest.approx((1.318761, 0.244419, 2.478261, 0.164182), rel=1e-5)
    turned = [(0.03, 0.02), *HALVES[1:]]
    assert ours.five_by_two(turned).t == pytest.approx(1.978141, rel=1e-5)
    assert ours.five_by_two(turned).f == pytest.approx(2.478261, rel=1e-5)
    minus = ours.five_by_two([(-a, -b) for a, b in HALVES])
    assert (minus.t, minus.f) == pytest.approx((-1.318761, 2.478261), rel=1e-5)
    assert ours.five_by_two(np.zeros((5, 2))) == (0, 1, 0, 1)
    with pytest.raises(ValueError, match="no variance"):
        ours.five_by_two(np.full((5, 2), 0.1))
    with pytest.raises(ValueError, match="five halvings"):
        ours.five_by_two(np.zeros((4, 2)))


def test_corrected_t_worked() -> None:
    d = [0.02, 0.01, 0.03, 0, 0.02, 0.01, 0.02, 0.03, 0.01, 0.02]
    naive, corrected = ours.corrected_t(d, 0.0), ours.corrected_t(d, 100 / 900)
    assert (naive.difference, naive.p, corrected.p) == pytest.approx((0.017, 0.000307, 0.003619), rel=1e-3)
    assert naive.p == pytest.approx(scipy.stats.ttest_1samp(d, 0).pvalue)
    assert (naive.low, naive.high) == pytest.approx(scipy.stats.ttest_1samp(d, 0).confidence_interval())
    assert corrected.high is not None
    assert naive.high is not None
    assert (corrected.high - 0.017) / (naive.high - 0.017) == pytest.approx(1.452966, rel=1e-6)
    assert ours.corrected_t([0.0, 0.0], 0.1).p == 1
    assert ours.corrected_t([0.1] * 3, 0.1).p is None


def test_holm_worked() -> None:
    assert ours.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ours.holm([0.001, 0.01, 0.02, 0.03, 0.2]) == pytest.approx([0.005, 0.04, 0.06, 0.06, 0.2])
    assert ours.holm([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert ours.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_as_statsmodels(ps: list[float]) -> None:
    found = ours.holm(ps)
    assert found == pytest.approx(multipletests(ps, method="holm")[1].tolist())
    bonferroni = [min(1, len(ps) * p) for p in ps]
    assert all(
        f is not None and p - 1e-12 <= f <= b + 1e-12 for p, f, b in zip(ps, found, bonferroni, strict=True)
    )


@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=10),
    st.lists(st.floats(-10, 10), min_size=2, max_size=10),
)
def test_welch_as_scipy(a: list[float], b: list[float]) -> None:
    found = ours.welch(a, b)
    if np.var(a) + np.var(b) > 1e-9:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, of nearly equal values
            other = scipy.stats.ttest_ind(a, b, equal_var=False)
            assert found.p == pytest.approx(other.pvalue, rel=1e-6)
            assert (found.low, found.high) == pytest.approx(other.confidence_interval(), rel=1e-6, abs=1e-9)


def test_interval_over_seeds() -> None:
    values = [0.90, 0.94, 0.95]
    assert ours.t_interval(values) == pytest.approx(
        scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    )
    assert ours.t_interval([0.9]) is None


def test_crossed_by_hand() -> None:
    """Three seeds and four examples; the mean squares are those of a two-way table."""
    d = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, -1.0]])
    mean, by_seed, by_example = d.mean(), d.mean(1), d.mean(0)
    seeds = 4 * sum((r - mean) ** 2 for r in by_seed) / 2
    examples = 3 * sum((c - mean) ** 2 for c in by_example) / 3
    rest = sum((d[s, i] - by_seed[s] - by_example[i] + mean) ** 2 for s in range(3) for i in range(4)) / 6
    variance = (seeds + max(examples - rest, 0)) / 12
    df = (seeds + max(examples - rest, 0)) ** 2 / (seeds**2 / 2)
    found = ours.crossed(d)
    assert found.difference == pytest.approx(mean)
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(mean / math.sqrt(variance), df))
    assert (found.low, found.high) == pytest.approx(
        scipy.stats.t.interval(0.95, df, mean, math.sqrt(variance))
    )


@given(st.integers(0, 1000))
def test_crossed_invariants(seed: int) -> None:
    random = np.random.default_rng(seed)
    d = random.integers(-1, 2, (random.integers(2, 5), random.integers(2, 30)))
    found, turned = ours.crossed(d), ours.crossed(-d)
    assert turned.difference == pytest.approx(-found.difference)
    assert turned.p == pytest.approx(found.p)
    assert ours.crossed(random.permutation(random.permutation(d).T).T).p == pytest.approx(found.p)
    assert found.p is None or 0 <= found.p <= 1


def test_crossed_without_variance() -> None:
    assert ours.crossed(np.zeros((3, 5))).p == 1
    assert ours.crossed(np.full((3, 5), 0.1)).p is None
    assert ours.crossed(np.tile([0.1, 0.3, 0.2], (3, 1))).p is not None  # seeds agree; examples vary


def _null(
    random: np.random.Generator, seeds: int, n: int, seed_effect: float, example_effect: float
) -> np.ndarray:
    """Return the difference of the right answers of two equally good methods [seeds, n]."""
    difficulty, models = random.normal(2, 2, n), []
    for _ in range(2):
        strength = (
            difficulty
            + example_effect * random.normal(0, 1, n)
            + seed_effect * random.normal(0, 1, (seeds, 1))
        )
        models.append((strength + random.normal(0, 1, (seeds, n)) > 0).astype(float))
    return models[0] - models[1]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("seed_effect", "example_effect"), [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0)])
def test_a_difference_between_equal_methods_is_rarely_found(
    seeds: int, seed_effect: float, example_effect: float
) -> None:
    """Under the null about 5 % of 2,000 tests find a difference; treating seeds as examples finds more."""
    random = np.random.default_rng(seeds)
    found, naive = 0, 0
    for _ in range(2000):
        d = _null(random, seeds, 100, seed_effect, example_effect)
        p = ours.crossed(d).p
        found += p is not None and p <= 0.05
        naive += ours.mcnemar_midp(int((d > 0).sum()), int((d < 0).sum())) <= 0.05
    assert found / 2000 < 0.085
    assert seed_effect == 0 or naive / 2000 > 0.2


def test_null_rates_of_midp_and_five_by_two() -> None:
    random = np.random.default_rng(0)
    midp = np.mean([ours.mcnemar_midp(b, 30 - b) <= 0.05 for b in random.binomial(30, 0.5, 2000)])
    f = np.mean([ours.five_by_two(random.normal(0, 1, (5, 2))).f_p <= 0.05 for _ in range(2000)])
    splits = np.stack(
        [np.repeat(random.normal(0, 1, (2000, 1)), 10, 1), random.normal(0, 1, (2000, 10))]
    ).sum(0)  # overlapping training sets
    naive = np.mean([ours.corrected_t(d, 0.0).p <= 0.05 for d in splits.tolist()])  # type: ignore[operator]
    assert midp <= 0.06
    assert f <= 0.065
    assert naive > 0.2


def test_bootstrap_as_every_resample() -> None:
    """Five examples have 3,125 resamples, whose percentiles are the exact result."""
    bits, other, size = (
        np.array([3.0, 1.0, 4.0, 1.0, 5.0]),
        np.array([2.0, 2.0, 3.0, 2.0, 4.0]),
        np.array([1.0, 2.0, 2.0, 1.0, 3.0]),
    )
    every = [list(chosen) for chosen in itertools.product(range(5), repeat=5)]
    exact = np.array([bits[c].sum() / size[c].sum() - other[c].sum() / size[c].sum() for c in every])
    found = ours.paired_bootstrap((bits, size), (other, size), draws=40_000)
    assert found.difference == pytest.approx(14 / 9 - 13 / 9)
    assert (found.low, found.high) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.03)
    assert found.p == pytest.approx(min(1, 2 * min((exact <= 0).mean(), (exact >= 0).mean())), abs=0.02)
    assert ours.paired_bootstrap((bits, size), (other, size), draws=40_000) == found


def test_bootstrap_of_many_examples_comes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    a, b, ones = random.normal(0.5, 1, 400), random.normal(0.3, 1, 400), np.ones(400)
    whole = ours.paired_bootstrap((a, ones), (b, ones), draws=4000)
    monkeypatch.setattr(ours, "CACHED", 40_000)
    parts = ours.paired_bootstrap((a, ones), (b, ones), draws=4000, seed=5)
    error = np.std(a - b) / 20
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.2 * error)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * error, rel=0.1)  # type: ignore[operator]


def test_bootstrap_of_counts_as_of_examples() -> None:
    right, other = np.repeat([1, 1, 0, 0], [60, 25, 10, 5]), np.repeat([1, 0, 1, 0], [60, 25, 10, 5])
    ones = np.ones(100)
    slow, fast = (
        ours.paired_bootstrap((right, ones), (other, ones), draws=20_000),
        ours.bootstrap_counts(25, 10, 100, draws=20_000),
    )
    assert fast.difference == pytest.approx(slow.difference)
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high), abs=0.011)
    assert fast.p == pytest.approx(slow.p, abs=0.006)


def test_linearised_values_vary_as_the_ratio() -> None:
    random = np.random.default_rng(0)
    bits, size = random.gamma(4, 1, 300), random.gamma(9, 1, 300)
    values = ours.linearised(bits, size)
    assert values.mean() == pytest.approx(bits.sum() / size.sum())
    drawn = random.integers(0, 300, (4000, 300))
    assert values.std() / math.sqrt(300) == pytest.approx(
        np.std(bits[drawn].sum(1) / size[drawn].sum(1)), rel=0.06
    )


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=12))
def test_friedman_as_scipy(values: list[list[int]]) -> None:
    chi2, p, means = ours.friedman(values)
    assert means == pytest.approx(scipy.stats.rankdata(values, axis=1).mean(0))
    if any(len(set(row)) > 1 for row in values):
        other = scipy.stats.friedmanchisquare(*np.array(values).T)
        assert (chi2, p) == pytest.approx((other.statistic, other.pvalue))
    else:
        assert (chi2, p) == (0, 1)


@pytest.mark.parametrize("groups", [2, 3, 5, 10, 50])
def test_critical_difference(groups: int) -> None:
    q = scipy.stats.studentized_range.ppf(0.95, groups, np.inf)
    assert ours.studentized_range(groups) == pytest.approx(q, rel=1e-5)
    assert ours.critical_difference(groups, 6) == pytest.approx(
        q / math.sqrt(2) * math.sqrt(groups * (groups + 1) / 36), rel=1e-5
    )


def test_critical_difference_of_demsar() -> None:
    """Demsar (2006): four classifiers on 14 data sets have 1.25, with q = 2.569 from the paper's table."""
    assert ours.critical_difference(4, 14) == pytest.approx(2.569 * math.sqrt(20 / 84), rel=1e-3)


def test_cliques() -> None:
    assert ours.cliques([1.0, 3.2, 1.5, 2.4], 1.0) == [[0, 2], [2, 3], [3, 1]]
    assert ours.cliques([1.0, 1.5, 2.0], 1.0) == [[0, 1, 2]]
    assert ours.cliques([1.0, 3.0], 1.0) == []


@given(st.lists(st.floats(1, 9), min_size=1, max_size=7), st.floats(0, 4))
def test_cliques_as_brute_force(ranks: list[float], cd: float) -> None:
    sets = [
        set(c) for size in range(2, len(ranks) + 1) for c in itertools.combinations(range(len(ranks)), size)
    ]
    fitting = [s for s in sets if max(ranks[i] for i in s) - min(ranks[i] for i in s) <= cd]
    largest = [s for s in fitting if not any(s < other for other in fitting)]
    assert sorted(map(sorted, ours.cliques(ranks, cd))) == sorted(map(sorted, largest))
