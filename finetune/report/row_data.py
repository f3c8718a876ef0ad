"""Describe a row of a comparison as JSON: its values, costs, verdict, curve and command."""

from __future__ import annotations

import statistics as plain_statistics
from collections.abc import Sequence
from typing import Any

from ..config import plugin_records
from . import statistics
from .command import Defaults, make_command
from .fairness import count_without_result
from .judge import Judge
from .metric import main_metric
from .rows import Row
from .runs import Run, get_numbers, look_up
from .verdicts import Verdicts

COSTS = {
    "trained": "params.trained",
    "changed": "changed",
    "stored_bytes": "stored_bytes",
    "step_seconds": "cost.step_seconds_median",
    "peak_memory_bytes": "cost.peak_memory_bytes",
    "train_seconds": "cost.train_seconds",
}  # keys of a row, and where a result has them


def describe_row(
    row: Row, judge: Judge, verdicts: Verdicts, curves: bool, defaults: Defaults | None
) -> dict[str, Any]:
    """Return the row as JSON; ``curves`` and ``defaults`` are those of ``Comparison.as_dict``."""
    measure = judge.measure
    values = list(judge.get_values(row).values())
    key = find_main_key(row.finished) or measure.key
    low, high = statistics.t_interval(values) or (None, None)
    base, curve = None, []
    if measure.split == "test":
        base = _mean(get_numbers(row.finished, f"base.{measure.key}"))
    if curves:
        curve = _average_curves(row.finished, key)
    return {
        "label": row.label,
        "by": row.by,
        "seeds": [run.seed for run in row.finished],
        "finished": len(row.finished),
        **count_without_result(row.runs),
        "missing": len(row.finished) - len(values),
        "errors": [f"{run.path}: {run.error}" for run in row.runs if run.error],
        "values": values,
        "mean": _mean(values),
        "sd": plain_statistics.stdev(values) if len(values) > 1 else None,
        "low": low,
        "high": high,
        "single_seed": len(values) == 1,
        "examples": _describe_examples(row, judge),
        "base": base,
        "retention": _describe_retention(row.finished, key),
        **_describe_costs(row),
        "rank": verdicts.ranks.get(row.label, ""),
        "versus": verdicts.versus.get(row.label),
        "command": make_command(row.finished or row.runs, defaults),
        "plugins": [plugin_records.describe(record) for record in row.plugins],
        "runs": [str(run.path) for run in row.runs],
        "curve": curve,
    }


def find_main_key(runs: Sequence[Run]) -> str | None:
    """Return the key of the task's main metric, from the first finished run that has one."""
    for run in runs:
        test = look_up(run.result, "metrics.test")
        if run.status != "finished" or not isinstance(test, dict):
            continue
        metric = main_metric(test)
        if metric:
            return metric.key
    return None


def _mean(values: Sequence[float]) -> float | None:
    return plain_statistics.fmean(values) if values else None


def _describe_examples(row: Row, judge: Judge) -> dict[str, Any] | None:
    """Return Wilson's interval of a single seed's accuracy over its test examples, and their number."""
    if len(row.finished) != 1 or judge.measure.name != "test.accuracy":
        return None
    found = judge.predictions.get(row.finished[0])
    if found is None:
        return None
    low, high = statistics.wilson(int(found.above.sum()), len(found.above))
    return {"count": len(found.above), "low": low, "high": high}


def _describe_retention(runs: Sequence[Run], key: str) -> dict[str, Any] | None:
    """Return mean and interval of the metric on the retention split, and its mean before training."""
    values = get_numbers(runs, f"retention.{key}")
    if not values:
        return None
    low, high = statistics.t_interval(values) or (None, None)
    base = _mean(get_numbers(runs, f"base_retention.{key}"))
    return {"mean": _mean(values), "low": low, "high": high, "base": base}


def _describe_costs(row: Row) -> dict[str, Any]:
    """Return medians over the finished runs; for peak memory and tuning trials the maximum."""
    costs: dict[str, Any] = {}
    for key, name in COSTS.items():
        values = get_numbers(row.finished, name)
        if not values:
            costs[key] = None
        elif key == "peak_memory_bytes":
            costs[key] = max(values)
        elif all(isinstance(value, int) for value in values):
            costs[key] = plain_statistics.median_low(values)  # stays an integer
        else:
            costs[key] = plain_statistics.median(values)
    trials = [run.tuning["trials"] for run in row.runs if run.tuning]
    costs["trials"] = max(trials, default=None)
    return costs


def _average_curves(runs: Sequence[Run], key: str) -> list[dict[str, Any]]:
    """Return, for each validated step, mean and interval of the metric over seeds, and the mean loss."""
    values: dict[int, list[float]] = {}
    losses: dict[int, list[float]] = {}
    for run in runs:
        for step, value, loss in run.read_curve(key):
            values.setdefault(step, []).append(value)
            if loss is not None:
                losses.setdefault(step, []).append(loss)
    curve = []
    for step, found in sorted(values.items()):
        low, high = statistics.t_interval(found) or (None, None)
        loss = _mean(losses.get(step, []))
        curve.append({"step": step, "mean": _mean(found), "low": low, "high": high, "loss": loss})
    return curve
