"""What ``finetune sweep`` prints on standard output: results, the trials of a search, and what would be run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..sweep.grid import Point


def show(results: Sequence[tuple[Point, dict[str, Any]]], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"run": str(point.folder.path), **result} for point, result in results], indent=2))
    elif results:
        from rich.console import Console

        from ..report.comparison import compare
        from ..report.formats import show_in_terminal
        from ..storage.atomic import to_json_value

        console, folders = Console(), dict[Any, list[Path]]()
        for point, _ in results:  # a table compares runs of one data set
            which = tuple(getattr(point.config.dataset, key, None) for key in ("name", "path", "config"))
            folders.setdefault(which, []).append(point.folder.path)
        for of_one in folders.values():
            for part in show_in_terminal(to_json_value(compare(of_one).as_dict(curves=False)), console.width):
                console.print(part)
        print(f"Everything lies in {results[0][0].folder.path.parent}")


def show_search(results: Sequence[tuple[Point, dict[str, Any]]]) -> None:
    """The trials, best on validation first; the test set has no say in a search."""
    from ..report.metric import main_metric
    from .display import show_table

    rows = []
    for point, result in results:
        found = (result.get("metrics") or {}).get("val") or {}
        metric = main_metric(found)
        rows.append({"settings": point.label, "validation": metric.show(found[metric.key]) if metric else None, "status": result["status"],
                     "run": point.folder.path.name})  # fmt: skip
    if rows:
        show_table(rows)
        print(f"Everything lies in {results[0][0].folder.path.parent}")


def show_forecast(told: dict[str, Any], as_json: bool) -> None:
    from ..report.metric import show_bytes
    from ..sweep.status import show_seconds
    from .display import show_tree

    if as_json:
        show_tree(told, as_json)
        return
    faults = {row["fault"]: row["settings"] for row in told["runs"] if row["fault"]}
    fits = {True: "fits", False: "does not fit", None: "?"}
    rows = []
    for row in told["runs"]:
        used = (
            "?" if row["memory_bytes"] is None else f"{show_bytes(row['memory_bytes'])}, {fits[row['fits']]}"
        )
        costs = (
            {"time": show_seconds(row["seconds"]), "memory": used}
            if not row["would"].startswith("be ")
            else {"time": "", "memory": ""}
        )
        rows.append(
            {key: "?" if row[key] is None else row[key] for key in ("run", "settings", "seed", "would")}
            | costs
        )
    total = {key: value for key, value in told["total"].items() if value is not None} | {
        "seconds": show_seconds(told["total"]["seconds"])
    }
    show_tree({"folder": told["folder"], "runs": rows, "total": total}, as_json)
    if any(row["run"] is None for row in told["runs"]):
        print(
            "Runs named ? take the value that their trials choose; which of them are finished is known when the trials are.",
            file=sys.stderr,
        )
    for fault, settings in faults.items():
        print(f"Warning: {settings} could not be measured: {fault}", file=sys.stderr)
