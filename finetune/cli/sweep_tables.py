"""Print what ``finetune sweep`` shows on standard output: results, the trials of a search, and forecasts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..sweep.grid import Point


def show(results: Sequence[tuple[Point, dict[str, Any]]], as_json: bool) -> None:
    """Print the results of runs as JSON, or as one comparison for each data set."""
    if as_json:
        print(json.dumps([{"run": str(point.folder.path), **result} for point, result in results], indent=2))
        return
    if not results:
        return
    from rich.console import Console

    from ..report.comparison import compare
    from ..report.formats import show_in_terminal
    from ..storage.atomic import to_json_value

    console, folders = Console(), dict[Any, list[Path]]()
    for point, _ in results:
        data = point.config.dataset
        which = (data.name, getattr(data, "path", None), getattr(data, "config", None))
        folders.setdefault(which, []).append(point.folder.path)
    for runs in folders.values():
        for part in show_in_terminal(to_json_value(compare(runs).as_dict(curves=False)), console.width):
            console.print(part)
    _show_folder(results)


def show_search(results: Sequence[tuple[Point, dict[str, Any]]]) -> None:
    """Print the trials of a search with their validation metrics, the best first."""
    from ..report.metric import main_metric
    from .display import show_table

    rows = []
    for point, result in results:
        found = (result.get("metrics") or {}).get("val") or {}
        metric = main_metric(found)
        rows.append(
            {
                "settings": point.label,
                "validation": metric.show(found[metric.key]) if metric else None,
                "status": result["status"],
                "run": point.folder.path.name,
            }
        )
    if rows:
        show_table(rows)
        _show_folder(results)


def _show_folder(results: Sequence[tuple[Point, dict[str, Any]]]) -> None:
    print(f"All files are in {results[0][0].folder.path.parent}")


def show_forecast(forecast: dict[str, Any], as_json: bool) -> None:
    """Print what a sweep would take, as ``sweep.forecast`` returns it."""
    from ..sweep.status import show_seconds
    from .display import show_tree

    if as_json:
        show_tree(forecast, as_json)
        return
    total = {key: value for key, value in forecast["total"].items() if value is not None}
    total["seconds"] = show_seconds(forecast["total"]["seconds"])
    rows = [_forecast_row(row) for row in forecast["runs"]]
    show_tree({"folder": forecast["folder"], "runs": rows, "total": total}, as_json)
    if any(row["run"] is None for row in forecast["runs"]):
        print(
            "Runs named ? take the value that their trials will choose. "
            "Until then it is not known whether they are finished already.",
            file=sys.stderr,
        )
    faults = {row["fault"]: row["settings"] for row in forecast["runs"] if row["fault"]}
    for fault, settings in faults.items():
        print(f"Warning: {settings} could not be measured: {fault}", file=sys.stderr)


def _forecast_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a row of a forecast; ``?`` stands for what is not known."""
    from ..report.metric import show_bytes
    from ..sweep.forecast import is_new
    from ..sweep.status import show_seconds

    cells = {}
    for key in ("run", "settings", "seed", "would"):
        cells[key] = "?" if row[key] is None else row[key]
    if not is_new(row["would"]):
        return cells | {"time": "", "memory": ""}
    memory = "?"
    if row["memory_bytes"] is not None:
        fits = {True: "fits", False: "does not fit", None: "?"}[row["fits"]]
        memory = f"{show_bytes(row['memory_bytes'])}, {fits}"
    return cells | {"time": show_seconds(row["seconds"]), "memory": memory}
