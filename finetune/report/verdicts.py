"""Test the rows of a comparison: against the baseline or the best row, in pairs, and all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import statistics
from .judge import Judge, correct
from .rows import Row
from .schema import Verdict

ALL_PAIRS = 12  # the largest number of rows for which every pair is tested


@dataclass
class Verdicts:
    """What the tests found.

    ``baseline``: the label of the given baseline. ``versus``: by label, the test against the baseline, or
    against the best row if none is given. ``ranks``: by label, ``best`` or ``tie`` for rows at the top.
    ``tests``: every pair of rows, or ``versus`` if there are many rows. ``omnibus`` and
    ``critical_difference``: all rows together, as JSON.
    """

    baseline: str | None = None
    versus: dict[str, Verdict] = field(default_factory=dict)
    ranks: dict[str, str] = field(default_factory=dict)
    tests: list[Verdict] = field(default_factory=list)
    omnibus: dict[str, Any] | None = None
    critical_difference: dict[str, Any] | None = None


def judge_rows(judge: Judge, rows: Sequence[Row], baseline: Row | None) -> Verdicts:
    """Test ``rows``, which have a mean and are sorted from best to worst. ``baseline`` may lack a mean."""
    found = Verdicts(baseline.label if baseline else None)
    if len(rows) > 1:
        versus_best = _compare_with(judge, rows, rows[0])
        found.ranks = _rank_top(rows[0].label, versus_best)
        if baseline is None:
            found.versus = versus_best
        elif any(row is baseline for row in rows):
            found.versus = _compare_with(judge, rows, baseline)
        if len(rows) <= ALL_PAIRS:
            found.tests = _test_pairs(judge, rows)
        else:
            found.tests = [_name_rows(label, verdict) for label, verdict in found.versus.items()]
    if len(rows) > 2:
        _test_together(judge, rows, found)
    return found


def _compare_with(judge: Judge, rows: Sequence[Row], baseline: Row) -> dict[str, Verdict]:
    """Test every other row against ``baseline``, with Holm's correction."""
    found = {}
    for row in rows:
        if row is not baseline:
            found[row.label] = judge.compare_rows(row, baseline)
    correct(list(found.values()), judge.measure.higher_is_better)
    return found


def _rank_top(best: str, versus_best: dict[str, Verdict]) -> dict[str, str]:
    """Return ``tie`` for all rows that share the top, or ``best`` for a row that beats all others."""
    ties = [label for label, verdict in versus_best.items() if verdict["verdict"] == "tie"]
    if ties:
        return dict.fromkeys([best, *ties], "tie")
    if all(verdict["verdict"] == "worse" for verdict in versus_best.values()):
        return {best: "best"}
    return {}


def _test_pairs(judge: Judge, rows: Sequence[Row]) -> list[Verdict]:
    tests = []
    for at, a in enumerate(rows):
        for b in rows[at + 1 :]:
            tests.append(_name_rows(a.label, judge.compare_rows(a, b)))
    correct(tests, judge.measure.higher_is_better)
    return tests


def _name_rows(a: str, verdict: Verdict) -> Verdict:
    """Return the verdict with the labels of both rows under ``a`` and ``b``."""
    test = {"a": a, "b": verdict["against"], **verdict}
    del test["against"]
    return test


def _test_together(judge: Judge, rows: Sequence[Row], found: Verdicts) -> None:
    """Test whether the rows differ at all.

    Uses Friedman's test over the repetitions that all rows share, with Nemenyi's critical difference; for a
    single repetition, Cochran's Q over its test examples.
    """
    values = [judge.get_values(row) for row in rows]
    shared = set(values[0]).intersection(*values)
    blocks = [block for block in values[0] if block in shared]
    if len(blocks) < 2:
        found.omnibus = _test_by_example(judge, rows)
        return
    sign = -1 if judge.measure.higher_is_better else 1
    table = []
    for block in blocks:
        table.append([sign * by_block[block] for by_block in values])
    chi2, p, mean_ranks = statistics.friedman(table)
    found.omnibus = {
        "test": "friedman",
        "statistic": chi2,
        "df": len(rows) - 1,
        "p": p,
        "blocks": len(blocks),
        "rows": len(rows),
    }
    critical = statistics.critical_difference(len(rows), len(blocks))
    cliques = []
    for clique in statistics.cliques(mean_ranks.tolist(), critical):
        cliques.append([rows[place].label for place in clique])
    ranks = {row.label: float(rank) for row, rank in zip(rows, mean_ranks, strict=True)}
    found.critical_difference = {"ranks": ranks, "cd": critical, "cliques": cliques, "blocks": len(blocks)}


def _test_by_example(judge: Judge, rows: Sequence[Row]) -> dict[str, Any] | None:
    matrix = judge.make_matrix(rows)
    if matrix is None:
        return None
    q, df, p = statistics.cochran_q(matrix)
    return {
        "test": "cochran q",
        "statistic": q,
        "df": df,
        "p": p,
        "examples": len(matrix),
        "rows": len(rows),
    }
