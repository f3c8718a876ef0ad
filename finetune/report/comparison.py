"""Runs compared: rows by configuration, what is known of each, and which differ by more than chance.

``compare`` gives a ``Comparison``; its ``as_dict`` is all that tables, the HTML report, plots and W&B are drawn from. docs/comparing.md says what
each number means and which claim each test supports.
"""

from __future__ import annotations

import statistics as plain_statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, near
from . import fairness, notes, statistics
from .command import command
from .judge import Judge, Verdict, correct
from .metric import main_metric
from .rows import Row, axes, group, name, shown
from .runs import LOST, Run, find, read
from .score import Score

FORMAT = 1
ALL_PAIRS = 12  # rows up to which every pair is tested, too
TASKS = {"accuracy": "classification", "bits_per_byte": "causal_lm"}
Defaults = Callable[[Sequence[str]], Mapping[str, Any]]


@dataclass
class Comparison:
    """Rows, best first, and what was found about them; ``findings`` is the fairness check."""

    score: Score
    task: str | None
    keys: list[str]
    rows: list[Row]
    baseline: str | None
    judge: Judge
    versus: dict[str, Verdict] = field(default_factory=dict)
    ranks: dict[str, str] = field(default_factory=dict)
    tests: list[Verdict] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    omnibus: dict[str, Any] | None = None
    critical: dict[str, Any] | None = None

    def as_dict(self, curves: bool = True, defaults: Defaults | None = None) -> dict[str, Any]:
        """Strict JSON. ``curves``: validation over steps, which takes reading every ``metrics.jsonl``; ``defaults``: as ``command`` takes them."""
        score = self.score
        return {
            "format": FORMAT,
            "metric": {
                "name": score.name,
                "words": score.words,
                "higher_is_better": score.higher_is_better,
                "percent": score.percent,
            },
            "task": self.task,
            "by": [name(key) for key in self.keys],
            "baseline": self.baseline,
            "rows": [self._row(row, curves, defaults) for row in self.rows],
            "tests": self.tests,
            "omnibus": self.omnibus,
            "critical_difference": self.critical,
            "fairness": self.findings,
            "notes": self.notes,
        }

    def _row(self, row: Row, curves: bool, defaults: Defaults | None) -> dict[str, Any]:
        found = list(self.judge.values(row).values())
        values, key = found, main_key(row.finished) or self.score.key
        mean = plain_statistics.fmean(values) if values else None
        low, high = statistics.t_interval(values) or (None, None)
        counts = {status: sum(run.status == status for run in row.runs) for status in LOST}
        return {
            "label": row.label,
            "by": row.by,
            "seeds": [run.seed for run in row.finished],
            "finished": len(row.finished),
            **counts,
            "missing": len(row.finished) - len(values),
            "errors": [f"{run.path}: {run.error}" for run in row.runs if run.error],
            "values": values,
            "mean": mean,
            "sd": plain_statistics.stdev(values) if len(values) > 1 else None,
            "low": low,
            "high": high,
            "single_seed": len(values) == 1,
            "examples": self._of_examples(row),
            "base": _mean(row.finished, f"base.{self.score.key}") if self.score.split == "test" else None,
            "retention": _retention(row.finished, key),
            **_costs(row),
            "rank": self.ranks.get(row.label, ""),
            "versus": self.versus.get(row.label),
            "command": command(row.finished or row.runs, defaults),
            "runs": [str(run.path) for run in row.runs],
            "curve": _curve(row.finished, key) if curves else [],
        }

    def _of_examples(self, row: Row) -> dict[str, Any] | None:
        """Wilson's interval over the test examples of a single seed's accuracy, and how many they are."""
        if (
            len(row.finished) != 1
            or self.score.name != "test.accuracy"
            or (found := self.judge.predictions.of(row.finished[0])) is None
        ):
            return None
        low, high = statistics.wilson(int(found.above.sum()), len(found.above))
        return {"count": len(found.above), "low": low, "high": high}


def compare(
    folders: Sequence[Path], by: Sequence[str] = (), metric: str | None = None, baseline: str | None = None
) -> Comparison:
    """Compare the runs in ``folders``. Raises ``ConfigError`` where they cannot be: no runs, several tasks, an unknown field, metric or baseline."""
    runs = read(find(folders))
    _one_task(runs)
    score = _score(runs, metric)
    keys = axes(runs, by)
    judge = Judge(score)
    rows = group(runs, keys)
    means = {
        row.label: plain_statistics.fmean(values.values()) for row in rows if (values := judge.values(row))
    }
    sign = -1 if score.higher_is_better else 1
    rows.sort(key=lambda row: (row.label not in means, sign * means.get(row.label, 0.0), row.label))
    against = _baseline(rows, baseline)
    found = Comparison(score, _task(runs), keys, rows, against.label if against else None, judge)
    ranked = [row for row in rows if row.label in means]
    _judge(found, ranked, against)
    found.omnibus, found.critical = _omnibus(judge, ranked)
    found.findings = fairness.check(rows, keys)
    relabelled = judge.relabelled(ranked)
    if relabelled:
        changed = {label: f"{count:,} other labels" for label, count in relabelled.items()}
        words = (
            f"Test examples of the same id have other labels, so the data differ: {fairness.listed(changed)}."
        )
        found.findings.append(fairness.finding("setting", "test labels", changed, words))
    found.notes = notes.of(found, runs)
    return found


def _one_task(runs: Sequence[Run]) -> None:
    """Raises ``ConfigError`` for runs that no one table can compare."""
    for what, of in (("data sets", _data), ("tasks", lambda run: _task([run]))):
        groups: dict[str, list[Run]] = {}
        for run in runs:
            if (value := of(run)) is not None:
                groups.setdefault(value, []).append(run)
        if len(groups) > 1:
            told = "; ".join(
                f"{value}: {len(members)} run{'s' * (len(members) > 1)}, such as {members[0].path}"
                for value, members in groups.items()
            )
            raise ConfigError(
                f"These runs are of {len(groups)} {what}, which one table cannot compare ({told}). Give the folders of one at a time."
            )


def _data(run: Run) -> str | None:
    """The data set with what tells apart data sets of that kind."""
    told = [run.settings.get(f"dataset.{key}") for key in ("name", "path", "config")]
    if run.known:
        return " ".join(shown(value) for value in told if value is not None)
    return None


def _task(runs: Sequence[Run]) -> str | None:
    return next((TASKS[key] for run in runs if (key := main_key([run]))), None)


def main_key(runs: Sequence[Run]) -> str | None:
    """The key of the task's main metric, of the first run that has it."""
    metrics = (run.result.get("metrics") for run in runs if run.status == "finished")
    tests = (found.get("test") for found in metrics if isinstance(found, dict))
    return next(
        (metric.key for test in tests if isinstance(test, dict) and (metric := main_metric(test))), None
    )


def _score(runs: Sequence[Run], wanted: str | None) -> Score:
    """The metric asked for, or the task's own. Raises ``ConfigError`` where no run has it."""
    if wanted is None:
        return Score(f"test.{main_key(runs) or 'accuracy'}")
    done = [run for run in runs if run.status == "finished"]
    for option in (wanted, f"test.{wanted}", f"cost.{wanted}"):
        if any(run.number(option) is not None for run in done):
            return Score(option)
    if not done:
        return Score(wanted)
    options = sorted(set(_numbers(done[0].result)))
    raise ConfigError(
        f"--metric {wanted}: no run has it.{near(wanted, options)} The first run has: {', '.join(options)}."
    )


def _numbers(tree: Any, prefix: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [
            found
            for key, value in tree.items()
            for found in _numbers(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return (
        [prefix.removeprefix("metrics.")]
        if isinstance(tree, int | float) and prefix not in ("format", "seed")
        else []
    )


def _baseline(rows: Sequence[Row], wanted: str | None) -> Row | None:
    """The row that ``wanted`` names: its label, or values of its fields. Raises ``ConfigError`` unless that is one."""
    if wanted is None:
        return None
    words = set(wanted.replace(",", " ").split())
    exact = [row for row in rows if row.label == wanted or set(row.label.split()) == words]
    told = [(row, {*row.label.split(), *(shown(value) for value in row.by.values())}) for row in rows]
    found = exact or [
        row
        for row, has in told
        if words and words <= has | {f"{key}={shown(value)}" for key, value in row.by.items()}
    ]
    if len(found) == 1:
        return found[0]
    labels = [row.label for row in rows]
    what = (
        f"could be {', '.join(row.label for row in found)}"
        if found
        else f"is no row.{near(wanted, labels)} Rows: {', '.join(labels)}"
    )
    raise ConfigError(f"--baseline {wanted} {what}. Give one row as the table names it.")


def _judge(found: Comparison, rows: Sequence[Row], baseline: Row | None) -> None:
    """Every row against the baseline, or else the best; who shares the top; and, of few rows, every pair."""
    judge, better = found.judge, found.score.higher_is_better
    if len(rows) < 2:
        return
    top = {row.label: judge.versus(row, rows[0]) for row in rows[1:]}
    correct(list(top.values()), better)
    said = {verdict["verdict"] for verdict in top.values()}
    ties = [label for label, verdict in top.items() if verdict["verdict"] == "tie"]
    found.ranks = (
        dict.fromkeys([rows[0].label, *ties], "tie")
        if ties
        else {rows[0].label: "best"}
        if said == {"worse"}
        else {}
    )
    found.versus = top
    if baseline is not None:
        found.versus = (
            {row.label: judge.versus(row, baseline) for row in rows if row is not baseline}
            if baseline in rows
            else {}
        )
        correct(list(found.versus.values()), better)
    if len(rows) <= ALL_PAIRS:
        found.tests = [
            {"a": a.label, "b": b.label, **judge.versus(a, b)}
            for at, a in enumerate(rows)
            for b in rows[at + 1 :]
        ]
        correct(found.tests, better)
    else:
        found.tests = [
            {"a": label, "b": verdict["against"], **verdict} for label, verdict in found.versus.items()
        ]
    for test in found.tests:
        test.pop("against")


def _omnibus(judge: Judge, rows: Sequence[Row]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Whether the rows differ at all: Friedman over seeds with Nemenyi's critical difference, or Cochran's Q over one seed's examples."""
    if len(rows) < 3:
        return None, None
    values = [judge.values(row) for row in rows]
    blocks = [block for block in values[0] if all(block in other for other in values)]
    if len(blocks) < 2:
        matrix = judge.matrix(rows) if judge.by_example else None
        if matrix is None:
            return None, None
        q, df, p = statistics.cochran_q(matrix)
        return {
            "test": "cochran q",
            "statistic": q,
            "df": df,
            "p": p,
            "examples": len(matrix),
            "rows": len(rows),
        }, None
    sign = -1 if judge.score.higher_is_better else 1
    chi2, p, ranks = statistics.friedman([[sign * found[block] for found in values] for block in blocks])
    cd = statistics.critical_difference(len(rows), len(blocks))
    groups = [[rows[i].label for i in clique] for clique in statistics.cliques(ranks.tolist(), cd)]
    told = {row.label: float(rank) for row, rank in zip(rows, ranks, strict=True)}
    omnibus = {
        "test": "friedman",
        "statistic": chi2,
        "df": len(rows) - 1,
        "p": p,
        "blocks": len(blocks),
        "rows": len(rows),
    }
    return omnibus, {"ranks": told, "cd": cd, "cliques": groups, "blocks": len(blocks)}


def _mean(runs: Sequence[Run], key: str) -> float | None:
    found = [value for run in runs if (value := run.number(key)) is not None]
    return plain_statistics.fmean(found) if found else None


def _retention(runs: Sequence[Run], key: str) -> dict[str, Any] | None:
    found = [value for run in runs if (value := run.number(f"retention.{key}")) is not None]
    if not found:
        return None
    low, high = statistics.t_interval(found) or (None, None)
    return {
        "mean": plain_statistics.fmean(found),
        "low": low,
        "high": high,
        "base": _mean(runs, f"base_retention.{key}"),
    }


def _costs(row: Row) -> dict[str, Any]:
    """Medians over the finished runs; memory and tuning trials at their most."""
    names = {
        "trained": "params.trained",
        "stored_bytes": "stored_bytes",
        "step_seconds": "cost.step_seconds_median",
    }
    names |= {"peak_memory_bytes": "cost.peak_memory_bytes", "train_seconds": "cost.train_seconds"}
    costs: dict[str, Any] = {}
    for short, key in names.items():
        found = [value for run in row.finished if (value := run.number(key)) is not None]
        whole = all(isinstance(value, int) for value in found)
        middle = (
            max
            if short == "peak_memory_bytes"
            else plain_statistics.median_low
            if whole
            else plain_statistics.median
        )
        costs[short] = middle(found) if found else None
    trials = [count for run in row.runs if run.tuning and isinstance(count := run.tuning.get("trials"), int)]
    return {**costs, "trials": max(trials, default=None)}


def _curve(runs: Sequence[Run], key: str) -> list[dict[str, Any]]:
    """Means over the seeds that validated at a step, with their 95 % interval where there are several."""
    points: dict[int, list[tuple[float, float | None]]] = {}
    for run in runs:
        for step, value, loss in run.curve(key):
            points.setdefault(step, []).append((value, loss))
    curve = []
    for step, found in sorted(points.items()):
        values, losses = [value for value, _ in found], [loss for _, loss in found if loss is not None]
        low, high = statistics.t_interval(values) or (None, None)
        loss = plain_statistics.fmean(losses) if losses else None
        curve.append(
            {"step": step, "mean": plain_statistics.fmean(values), "low": low, "high": high, "loss": loss}
        )
    return curve
