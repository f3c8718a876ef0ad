"""A sweep: the cross product of the given values, each point a run in a process of its own.

All points are checked and frozen before the first one starts. A run folder is named by its content, so the same command again skips what
is finished and runs what is missing or failed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import config as configuration
from .errors import ConfigError
from .settings import Config
from .train.files import RunFolder, run_folder, write_json_atomic
from .train.result import make_result


@dataclass(frozen=True)
class Point:
    """One run of a sweep. ``label`` says in what it differs from the others, but for its seed; ``config`` has its ``name`` and ``run`` set."""

    label: str
    config: Config
    folder: RunFolder


def points(overrides: list[str], config_dir: Path | None = None, config_file: Path | None = None) -> list[Point]:
    """Every point of the sweep, checked; points of the same content are one. Raises ``ConfigError`` with the faults of all points."""
    if fixed := [text for text in overrides if text.startswith("run=")]:
        raise ConfigError(f"{fixed[0]}: a sweep names its runs by their content. Use name= for the folder that holds them.")
    found: dict[Path, Point] = {}
    faults: dict[str, list[str]] = {}
    expanded = configuration.expand(overrides, config_dir)
    for words in expanded:
        swept = [word for word in words if word not in overrides]
        try:
            point = _point(swept, configuration.load(words, config_dir, config_file), overrides)
            found.setdefault(point.folder.path, point)
        except ConfigError as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(" ".join(swept))
    if faults:
        raise ConfigError(*(fault + _where(at, len(expanded)) for fault, at in faults.items()))
    return list(found.values())


def _where(labels: list[str], of: int) -> str:
    """Which points have a fault that not all have."""
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return "" if len(labels) == of else f" (at {labels[0]}{more})"


def _point(swept: list[str], config: Config, overrides: list[str]) -> Point:
    name = next((config.name for text in overrides if text.startswith("name=")), None) or _name(overrides)
    path = run_folder(replace(config, name=name, run=None))
    label = " ".join(word for word in swept if not word.startswith("seed=")) or config.method.name
    return Point(label, replace(config, name=name, run=path.name), RunFolder(path))


def _name(overrides: list[str]) -> str:
    """The default name: the same for the same overrides in any order."""
    return f"sweep-{hashlib.sha256(chr(10).join(sorted(overrides)).encode()).hexdigest()[:8]}"


def outlook(runs: list[Point]) -> list[dict[str, str]]:
    """What would become of each point, without touching anything."""
    return [
        {
            "run": point.folder.path.name,
            "settings": point.label,
            "seed": str(point.config.seed),
            "would": "be skipped: finished" if point.folder.finished else "start",
        }
        for point in runs
    ]


def freeze(runs: list[Point]) -> None:
    """Write the frozen configuration of each point into its folder. Raises ``ConfigError`` where another run's files lie."""
    for point in runs:
        point.folder.open_or_check(point.config)


def run_all(runs: list[Point], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run what is not finished, one after the other, and return the content of every ``result.json``; a failure is a result too."""
    freeze(runs)
    results = []
    for number, point in enumerate(runs, 1):
        head = f"[{number}/{len(runs)}] {point.folder.path.name}"
        if point.folder.finished:
            say(f"{head}: finished before, skipped")
        else:
            say(f"{head}: running")
            start = time.perf_counter()
            outcome = _run(point)
            say(f"{head}: {outcome} after {time.perf_counter() - start:.0f} s")
        results.append(point.folder.read_result())
    return results


def _run(point: Point) -> str:
    """Run one point in a process of its own; leaves a ``result.json`` in any case and returns what became of it."""
    point.folder.result.unlink(missing_ok=True)  # of an earlier failure
    command = [sys.executable, "-m", __package__, "train", "--json", "--config", str(point.folder.config)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0 and point.folder.finished:
        return "finished"
    error = _reason(done.returncode, done.stderr)
    if not point.folder.result.exists():
        write_json_atomic(point.folder.result, make_result(point.config, status="failed", error=error))
    return f"failed ({error})"


def _reason(code: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    faults = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    if code < 0:
        return f"the process was ended by signal {-code}"
    return " ".join(faults) or (lines[-1] if lines else f"exit code {code}")
