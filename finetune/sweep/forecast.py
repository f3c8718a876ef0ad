"""Predict the time and memory of each point of a sweep from similar finished runs or from a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import registry
from ..config.settings import Config
from ..launch.start import NO_OPTIONS, StartOptions
from ..storage.result import group_hash
from ..storage.run_folder import RunFolder
from ..system import safe
from .grid import Point
from .measure import STEPS, Measurement, measure, room_for_one
from .process import should_rerun
from .status import duration
from .tune import Tuning

FINISHED, FAILED = "be skipped: finished", "be kept: failed"
FOLLOWS, RESUMES, STARTS = "follow its trials", "resume", "start"
Say = Callable[[str], None]


def forecast(
    runs: Sequence[Point],
    jobs: int,
    retry: bool = False,
    say: Say = lambda line: None,
    tuning: Tuning | None = None,
    options: StartOptions = NO_OPTIONS,
) -> dict[str, Any]:
    """Return the folder of a sweep, a row for every run, and totals, as plain data; write nothing.

    A row says what would happen to its run (``would``), how many ``seconds`` and ``memory_bytes`` it would
    take (``None`` if that is unknown), whether it ``fits`` in the memory of this machine beside the
    other ``jobs``, and the ``fault`` of a measurement that failed. The total of seconds is for ``jobs`` runs
    at once.

    With ``tuning``, its trials come first; a run whose tuned value is not chosen yet has no name.
    """
    trials = tuning.trials if tuning else []
    unnamed: list[Point] = []
    if tuning:
        there = [trial for trial in trials if not is_new(_outcome(trial, retry))]
        results = {trial.folder.path: trial.folder.read_result() for trial in there}
        runs, unnamed = tuning.foresee(results)
    room = room_for_one(jobs)
    estimates = _Estimates(say, options)
    rows = []
    for point in (*trials, *runs):
        rows.append(_row(point, point.folder.path.name, _outcome(point, retry), estimates, room))
    for point in unnamed:
        rows.append(_row(point, None, FOLLOWS, estimates, room))
    total = _total(rows, jobs, room)
    if tuning:
        new = [row for row in rows[: len(trials)] if is_new(row["would"])]
        total |= {"trials": len(trials), "trials_to_run": len(new)}
    return {"folder": str([*runs, *unnamed][0].folder.path.parent), "runs": rows, "total": total}


def _outcome(point: Point, retry: bool) -> str:
    """Return what would happen to a point."""
    folder = point.folder
    if folder.finished:
        return FINISHED
    if folder.result.is_file() and not retry and not should_rerun(folder.read_result()):
        return FAILED
    return RESUMES if any((folder.path / "checkpoints").glob("step-*")) else STARTS


def is_new(would: str) -> bool:
    """Tell whether a run with that outcome takes time and memory."""
    return would not in (FINISHED, FAILED)


class _Estimates:
    """Time and memory of configurations.

    They are taken from finished runs in other seeds, or else measured once for each kind of run.
    """

    def __init__(self, say: Say, options: StartOptions) -> None:
        self._say, self._options = say, options
        self._known = _finished_runs()
        self._measured: dict[str, Measurement] = {}

    def estimate(self, config: Config) -> dict[str, Any]:
        """Return ``seconds``, ``memory_bytes`` and ``fault`` of a run of ``config``."""
        if earlier := self._known.get(group_hash(config)):
            seconds = [taken for taken, _ in earlier if taken is not None]
            return {
                "seconds": statistics.median(seconds) if seconds else None,
                "memory_bytes": max(memory for _, memory in earlier),
                "fault": None,
            }
        kind = _kind(config)
        if kind not in self._measured:
            self._say(f"Measuring {STEPS} steps of method={config.method.name} on {config.dataset.name}")
            self._measured[kind] = measure(config, self._options)
        found = self._measured[kind]
        return {
            "seconds": found.seconds(config),
            "memory_bytes": found.memory_bytes,
            "fault": found.fault,
        }


def _kind(config: Config) -> str:
    """Return a key for the time of a step: of runs with one key, only the first is measured."""
    train = replace(config.train, steps=1)
    names = [config.section(kind.name).name for kind in registry.sections()]
    return repr((names, config.model, config.dataset, config.streams, train))


def _finished_runs() -> dict[str, list[tuple[float | None, int]]]:
    """Return seconds and peak bytes of every finished run under ``outputs``, by its ``group_hash``."""
    found: dict[str, list[tuple[float | None, int]]] = {}
    like = {"status": str, "cost": {"peak_memory_bytes": int}, "group_hash": str}
    for file in Path("outputs").glob("*/*/result.json"):
        try:
            result = safe.read_json(file, like)
        except (OSError, ValueError):
            continue
        if result["status"] == "finished":
            took = duration(RunFolder(file.parent))
            found.setdefault(result["group_hash"], []).append((took, result["cost"]["peak_memory_bytes"]))
    return found


def _row(point: Point, run: str | None, would: str, estimates: _Estimates, room: int) -> dict[str, Any]:
    """Return the row of a point whose run is called ``run``."""
    row: dict[str, Any] = {
        "run": run,
        "settings": point.label,
        "seed": point.config.seed,
        "would": would,
        "seconds": None,
        "memory_bytes": None,
        "fits": None,
        "fault": None,
    }
    if is_new(would):
        row |= estimates.estimate(point.config)
        if row["memory_bytes"] is not None:
            row["fits"] = row["memory_bytes"] <= room
    return row


def _total(rows: Sequence[dict[str, Any]], jobs: int, room: int) -> dict[str, Any]:
    """Return the counts of runs, the seconds with ``jobs`` runs at once, and the largest memory."""
    new = [row for row in rows if is_new(row["would"])]
    seconds = [row["seconds"] for row in new]
    at_once = min(jobs, max(1, len(new)))
    return {
        "runs": len(rows),
        "finished": [row["would"] for row in rows].count(FINISHED),
        "to_run": len(new),
        "seconds": None if None in seconds else sum(seconds) / at_once,
        "peak_memory_bytes": max((row["memory_bytes"] for row in new if row["memory_bytes"]), default=None),
        "room_bytes": room,
        "cannot_fit": [row["fits"] for row in rows].count(False),
    }
