"""Read the results of ``finetune analyze`` that runs have, and say which runs lack one that others have."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system import safe
from .rows import Row
from .runs import Run

FOLDER = "analysis"
MOST = 100  # files that are read of a run
LONGEST = 40  # characters of the name of a value, which a stranger may have chosen
SHOWN = 4  # values of a summary that a line shows
SHAPE = {"analysis": str, "options": {str: object}, "subjects": [{"run": str}], "summary": {str: object}}


def read_analyses(run: Run) -> list[dict[str, Any]]:
    """Return the results that a run has, by the names of their files; files that cannot be read are left out.

    Each has ``run``, ``analysis``, ``options``, ``others`` (the other runs that it is about) and ``summary``.
    Links are not followed.
    """
    found = []
    folder = run.path / FOLDER
    files = [] if folder.is_symlink() else sorted(folder.glob("*.json"))
    for file in files[:MOST]:
        try:
            content = None if file.is_symlink() else safe.read_json(file, SHAPE)
        except (OSError, ValueError):
            continue
        if content is None or not content["subjects"] or safe.explain_newer_format(file, content):
            continue
        if not 0 < len(content["analysis"]) <= LONGEST:
            continue
        found.append(
            {
                "run": str(run.path),
                "analysis": content["analysis"],
                "options": content["options"],
                "others": [subject["run"] for subject in content["subjects"][1:]],
                "summary": content["summary"],
            }
        )
    return found


def collect_analyses(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each analysis that some run has, what each row has of it, in the order of the rows.

    ``summary``: the mean of each number over the row's results. ``missing``: runs without a result.
    """
    by_row: list[dict[str, list[dict[str, Any]]]] = []
    for row in rows:
        results: dict[str, list[dict[str, Any]]] = {}
        for run in row.finished:
            for result in read_analyses(run):
                results.setdefault(result["analysis"], []).append(result)
        by_row.append(results)
    names: set[str] = set()
    for results in by_row:
        names.update(results)
    collected = []
    for analysis in sorted(names):
        for row, results in zip(rows, by_row, strict=True):
            of_row = results.get(analysis, [])
            missing = list(dict.fromkeys(str(run.path) for run in row.finished))
            for result in of_row:
                if result["run"] in missing:
                    missing.remove(result["run"])
            collected.append(
                {
                    "analysis": analysis,
                    "row": row.label,
                    "summary": _average(of_row),
                    "results": of_row,
                    "missing": missing,
                }
            )
    return collected


def _average(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each number that all summaries have; of true and false, the share of true."""
    means: dict[str, float] = {}
    if not results:
        return means
    for key in results[0]["summary"]:
        values = []
        for result in results:
            value = result["summary"].get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                values.append(float(value))
        if len(values) == len(results) and len(key) <= LONGEST:
            means[key] = statistics.fmean(values)
    return means


def describe_analyses(collected: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each row of each analysis."""
    lines = []
    for item in collected:
        results, missing = item["results"], item["missing"]
        words = f"Analysis {item['analysis']}, {item['row']}: "
        if results:
            values = [f"{key} {value:.4g}" for key, value in list(item["summary"].items())[:SHOWN]]
            words += f"{', '.join(values) or 'no numbers'} ({_describe_results(results)})."
        if missing:
            names = ", ".join(Path(path).name for path in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            words = f"{words.rstrip()} It is missing for {names}{more}."
        lines.append(words)
    return lines


def _describe_results(results: Sequence[Mapping[str, Any]]) -> str:
    """Say what a mean is taken over, or which other runs a single result is about."""
    options = [result["options"] for result in results]
    with_others = " and ".join(Path(path).name for path in results[0]["others"])
    if len(results) == 1:
        return f"with {with_others}" if with_others else "one run"
    said = f"mean of {len(results)} results"
    return f"{said} of different options" if any(other != options[0] for other in options) else said
