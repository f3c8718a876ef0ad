"""Results of many runs side by side: one row for runs that differ only in their seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .metric import METRICS, main_metric, show_bytes

if TYPE_CHECKING:
    from rich.table import Table

BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class RunsTable:
    """The rows as plain values; printed by rich as a table.

    A row: label, method, model, dataset, seeds (finished runs), failed (others), metric, base, mean, sd (``None`` for one seed),
    rank ("best", "tie" for several best to four decimals, or ""), trained, stored_bytes, step_seconds, peak_memory_bytes.
    """

    rows: list[dict[str, Any]]

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("run", "model", "dataset", *(_right(name) for name in ("seeds", "base", "test", "sd", "trained", "stored", "s/step", "peak")))
        for row in self.rows:
            table.add_row(*_cells(row))
        marks = {"best": "* best", "tie": "= equally good"}
        table.caption = "; ".join(words for rank, words in marks.items() if any(row["rank"] == rank for row in self.rows)) or None
        return table


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


def runs_table(results: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> RunsTable:
    """One row for all ``results`` (contents of ``result.json``) with the same ``group_hash``, in order of first appearance.

    ``labels``, one for each result, names the rows; by default the method does, with part of the hash where that is ambiguous.
    """
    groups: dict[Any, list[int]] = {}
    for number, result in enumerate(results):
        groups.setdefault(result.get("group_hash") or (_setting(result), labels[number] if labels else None), []).append(number)
    rows = []
    for key, members in groups.items():
        runs = [results[number] for number in members]
        twins = sum(_setting(results[others[0]]) == _setting(runs[0]) for others in groups.values())
        default = str(runs[0].get("method")) + (f" {str(key)[:6]}" if twins > 1 else "")
        rows.append(_row(labels[members[0]] if labels else default, runs))
    _rank(rows)
    return RunsTable(rows)


def _setting(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(key) for key in ("method", "model", "model_path", "dataset"))


def _row(label: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of the finished runs; costs as their median, memory as their maximum."""
    done = [run for run in runs if run.get("status") == "finished"]
    metric = main_metric(done[0]["metrics"].get("test")) if done else None
    values = [run["metrics"]["test"][metric.key] for run in done] if metric else []
    bases = [run["metrics"]["base"][metric.key] for run in done if run["metrics"].get("base")] if metric else []
    steps = [run["cost"]["step_seconds_median"] for run in done if run["cost"]["step_seconds_median"] is not None]
    return {
        "label": label,
        **{key: runs[0].get(key) for key in ("method", "model", "dataset")},
        "seeds": len(done),
        "failed": len(runs) - len(done),
        "metric": metric.key if metric else None,
        "base": statistics.fmean(bases) if bases else None,
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "rank": "",
        "trained": statistics.median_low([run["params"]["trained"] for run in done]) if done else None,
        "stored_bytes": statistics.median_low([run["stored_bytes"] for run in done]) if done else None,
        "step_seconds": statistics.median(steps) if steps else None,
        "peak_memory_bytes": max((run["cost"]["peak_memory_bytes"] for run in done), default=None),
    }


def _rank(rows: Sequence[dict[str, Any]]) -> None:
    """Mark the best of each model and data set, if it has something to be better than."""
    contests: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["metric"]:
            contests.setdefault((row["model"], row["dataset"], row["metric"]), []).append(row)
    for (_, _, key), contest in contests.items():
        choose = max if BY_KEY[key].higher_is_better else min
        top = choose(round(row["mean"], 4) for row in contest)
        winners = [row for row in contest if round(row["mean"], 4) == top]
        for row in winners if len(contest) > 1 else []:
            row["rank"] = "best" if len(winners) == 1 else "tie"


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The words of one row; what is not known is a dash."""
    seeds = f"{row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
    head = [row["label"], str(row["model"]), str(row["dataset"]), seeds]
    if row["metric"] is None:
        return [*head, *(["-"] * 7)]
    metric = BY_KEY[row["metric"]]
    mark = {"best": " *", "tie": " ="}.get(row["rank"], "")
    sd = "one seed" if row["sd"] is None else metric.show(row["sd"])
    base = "-" if row["base"] is None else metric.show(row["base"])
    step = "-" if row["step_seconds"] is None else f"{row['step_seconds']:.3g}"
    costs = [f"{row['trained']:,}", show_bytes(row["stored_bytes"]), step, show_bytes(row["peak_memory_bytes"])]
    return [*head, base, metric.show(row["mean"]) + mark, sd, *costs]
