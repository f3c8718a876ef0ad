"""Read what a sweep is doing now from the files of its folder alone. Imports no torch.

``sweep.json`` says what was asked for. The state of each run follows from its ``result.json``, the lock on
its folder and its ``metrics.jsonl``.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..storage.atomic import write_json_atomic
from ..storage.run_folder import TRIALS, RunFolder
from ..system import safe
from .grid import Point
from .lines import last_step, read_last_lines

FILE = "sweep.json"
LOCK = ".sweep.lock"
MEDIAN_STEPS = 50  # how many of the last steps give the median time that predicts the rest
STATES = ("finished", "running", "failed", "pruned", "waiting")
Entry = dict[str, Any]  # what sweep.json says of a run: run, label, seed, steps


def entry(point: Point, folder: Path) -> Entry:
    """Return what ``sweep.json`` says of a point of the sweep in ``folder``."""
    run = point.folder.path.relative_to(folder).as_posix()
    return {"run": run, "label": point.label, "seed": point.config.seed, "steps": point.config.train.steps}


@contextmanager
def announced(
    folder: Path, entries: Sequence[Entry], overrides: Sequence[str], jobs: int, command: str
) -> Iterator[Callable[[Sequence[Entry]], None]]:
    """Write ``sweep.json``, and hold a shared lock inside the block to show that the sweep is active.

    Yields a function that replaces the entries. The ``run`` of an entry is empty until its name is known.
    """
    about = {
        "format": 1,
        "overrides": list(overrides),
        "command": command,
        "jobs": jobs,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }

    def announce(entries: Sequence[Entry]) -> None:
        write_json_atomic(folder / FILE, about | {"points": list(entries)})

    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        announce(entries)
        yield announce
    finally:
        os.close(handle)


def is_locked(file: Path, mode: int = fcntl.LOCK_SH) -> bool:
    """Tell whether another process has locked ``file``. The check itself takes the lock for a moment."""
    try:
        handle = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@dataclass(frozen=True)
class RunState:
    """The state of a run: one of ``STATES``, its last step, and the seconds that it took or has left."""

    run: str
    label: str
    seed: int | None
    steps: int
    state: str = "waiting"
    step: int = 0
    seconds_left: float | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass
class Status:
    """Reads the state of the sweep in ``folder``, as often as asked; a finished run is read once.

    Raises ``ConfigError`` when ``folder`` holds no sweep.
    """

    folder: Path
    about: Mapping[str, Any] = field(init=False)
    _finished: dict[str, RunState] = field(default_factory=dict)
    _version: tuple[int, int] = (0, 0)  # inode and time of the sweep.json that was read

    def __post_init__(self) -> None:
        self._refresh()

    def _refresh(self) -> None:
        """Read ``sweep.json`` if it was written since: a search adds its trials one by one."""
        file = self.folder / FILE
        try:
            status = file.stat()
            version = (status.st_ino, status.st_mtime_ns)
            if version != self._version:
                self.about, self._version = _read_about(file), version
        except OSError:
            what = f"no sweep was run there (it has no {FILE})"
            if not self.folder.is_dir():
                what = "there is no such folder"
            raise ConfigError(f"{self.folder}: {what}. Give the folder of a sweep, outputs/NAME.") from None
        except ValueError:
            raise ConfigError(
                f"{file} was not written by a sweep. Run the sweep's command again to rewrite it."
            ) from None

    @property
    def alive(self) -> bool:
        """Whether a sweep works on the folder now."""
        return is_locked(self.folder / LOCK, fcntl.LOCK_EX)

    @property
    def seconds(self) -> float:
        """Seconds from the sweep's last start to now, or to the last sign of its runs if it has ended."""
        end = time.time()
        if not self.alive:
            end = max(
                (_last_sign(self.folder / str(point["run"])) for point in self.about["points"]), default=0
            )
        started = datetime.datetime.fromisoformat(str(self.about["started"]))
        return max(0.0, end - started.timestamp())

    def states(self) -> list[RunState]:
        """Return the state of every run."""
        self._refresh()
        return [self._state(point) for point in self.about["points"]]

    def _state(self, point: Mapping[str, Any]) -> RunState:
        name = str(point["run"])
        if name in self._finished:
            return self._finished[name]
        folder = RunFolder(self.folder / name)

        def make(state: str, **more: Any) -> RunState:
            return RunState(name, point["label"], point.get("seed"), point["steps"], state, **more)

        if is_locked(folder.path / ".lock"):
            step = last_step(folder)
            return make("running", step=step, seconds_left=_seconds_left(folder, point["steps"] - step))
        if not folder.result.is_file():
            return make("pruned" if point.get("pruned") else "waiting", step=last_step(folder))
        try:
            result = folder.read_result()
        except ConfigError as error:
            return make("failed", error=str(error))
        state = make(
            result["status"],
            step=result.get("steps", 0),
            seconds=duration(folder),
            error=result.get("error"),
        )
        if state.state == "finished":
            self._finished[name] = state
        return state

    def summary(self, states: Sequence[RunState]) -> dict[str, Any]:
        """Return the number of runs in each state, and the ``seconds_left`` (``None`` if not known)."""
        counts = Counter(state.state for state in states)
        found: dict[str, Any] = {name: counts[name] for name in STATES}
        took = [state.seconds for state in states if state.seconds]
        total = 0.0
        known = bool(took) or not counts["waiting"]
        if took:
            total = counts["waiting"] * statistics.mean(took)
        for state in states:
            if state.state == "running":
                known = known and state.seconds_left is not None
                total += state.seconds_left or 0.0
        at_once = min(int(self.about["jobs"]), max(1, counts["running"] + counts["waiting"]))
        return found | {"seconds_left": total / at_once if known else None}


def _read_about(file: Path) -> Mapping[str, Any]:
    """Read and check ``sweep.json``. Raises ``OSError`` and ``ValueError``."""
    point = {"run": str, "label": str, "steps": int}
    about: Mapping[str, Any] = safe.read_json(file, {"points": [point], "jobs": int, "started": str})
    for each in about["points"]:
        if not _is_inside(each["run"]):
            raise ValueError("a run outside the folder")
    datetime.datetime.fromisoformat(about["started"])
    return about


def _is_inside(run: str) -> bool:
    """Tell whether ``run`` names a folder of a sweep or one of its trials, or is empty."""
    *before, name = Path(run).parts or [""]
    return before in ([], [TRIALS]) and name not in ("..", "/")


def _last_sign(path: Path) -> float:
    """Return when a run last wrote its result or metrics, 0 if it never did."""
    folder = RunFolder(path)
    times = [file.stat().st_mtime for file in (folder.result, folder.metrics) if file.is_file()]
    return max(times, default=0.0)


def _seconds_left(folder: RunFolder, steps: int) -> float | None:
    """Predict the seconds of ``steps`` more steps from the median of the last ones; ``None`` without any."""
    seconds = []
    for line in read_last_lines(folder.metrics):
        if isinstance(line.get("seconds"), float):
            seconds.append(line["seconds"])
    if not seconds:
        return None
    return float(statistics.median(seconds[-MEDIAN_STEPS:])) * steps


def duration(folder: RunFolder) -> float | None:
    """Return the seconds from the start of the process that finished a run to its result, if known.

    A run of a sweep has its start in its lock. A run of ``finetune train`` has no lock and began when it
    wrote its configuration.
    """
    try:
        started = float(safe.read_json(folder.path / ".lock", {"started": float})["started"])
    except (OSError, ValueError):
        try:
            started = folder.config.stat().st_mtime
        except OSError:
            return None
    try:
        return max(0.0, folder.result.stat().st_mtime - started)
    except OSError:
        return None


def show_seconds(seconds: float | None) -> str:
    """Write a duration: ``40 s``, ``12 min``, ``3.5 h``, or ``?`` when not known."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
