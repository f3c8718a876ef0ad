"""What a sweep's folder is doing now, read from its files alone, by whoever may read them. Imports no torch.

``sweep.json`` says what was asked for; each run's state follows from its ``result.json``, the lock on its folder and its ``metrics.jsonl``.
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
from .process import last_step, tail

FILE = "sweep.json"
LOCK = ".sweep.lock"
TAIL = 50  # steps whose median time tells the rest
Row = dict[str, Any]


def entry(point: Point, folder: Path) -> Row:
    """What ``sweep.json`` says of a run of the sweep in ``folder``; of one that is not chosen yet ``run`` is empty there."""
    run = point.folder.path.relative_to(folder).as_posix()
    return {"run": run, "label": point.label, "seed": point.config.seed, "steps": point.config.train.steps}


@contextmanager
def announced(
    folder: Path, points: Sequence[Row], overrides: Sequence[str], jobs: int, command: str
) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Write ``sweep.json`` and, for the length of the block, hold a shared lock that tells others that the sweep goes on.

    ``points`` are entries; gives a function that takes others in their place.
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

    def announce(points: Sequence[Row]) -> None:
        write_json_atomic(folder / FILE, about | {"points": list(points)})

    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        announce(points)
        yield announce
    finally:
        os.close(handle)


def is_locked(file: Path, mode: int = fcntl.LOCK_SH) -> bool:
    """Whether another process has locked ``file``; looking takes the lock for a moment."""
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


@dataclass
class Status:
    """Reads the state of the sweep in ``folder`` again and again; what has ended is read once.

    Raises ``ConfigError`` when ``folder`` holds no sweep.
    """

    folder: Path
    about: Mapping[str, Any] = field(init=False)
    _ended: dict[str, Row] = field(default_factory=dict)
    _read: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self._refresh()

    def _refresh(self) -> None:
        """Read ``sweep.json`` if it was written since: a search adds its trials one by one."""
        file = self.folder / FILE
        try:
            there = file.stat()
            if (there.st_ino, there.st_mtime_ns) == self._read:
                return
            about = safe.read_json(
                file, {"points": [{"run": str, "label": str, "steps": int}], "jobs": int, "started": str}
            )
            if not all(_inside(point["run"]) for point in about["points"]):
                raise ValueError("a run outside the folder")
            datetime.datetime.fromisoformat(about["started"])
            self.about, self._read = about, (there.st_ino, there.st_mtime_ns)
        except OSError:
            what = (
                "there is no such folder"
                if not self.folder.is_dir()
                else f"no sweep was run there (it has no {FILE})"
            )
            raise ConfigError(f"{self.folder}: {what}. Give the folder of a sweep, outputs/NAME.") from None
        except ValueError:
            raise ConfigError(
                f"{file} is not what a sweep wrote. Give the command of the sweep again: it writes it anew."
            ) from None

    @property
    def alive(self) -> bool:
        """Whether a sweep works on the folder now."""
        return is_locked(self.folder / LOCK, fcntl.LOCK_EX)

    @property
    def seconds(self) -> float:
        """From the last start of the sweep to now, or, where none works on the folder any more, to the last sign of its runs."""
        end = time.time() if self.alive else max(map(self._last, self.about["points"]), default=0.0)
        return max(0.0, end - datetime.datetime.fromisoformat(str(self.about["started"])).timestamp())

    def _last(self, point: Mapping[str, Any]) -> float:
        folder = RunFolder(self.folder / str(point["run"]))
        return max(
            (file.stat().st_mtime for file in (folder.result, folder.metrics) if file.is_file()), default=0.0
        )

    def rows(self) -> list[Row]:
        """One for each point: run, label, seed, state ("finished", "failed", "pruned", "running" or "waiting"), step, steps, seconds_left, seconds,
        error."""
        self._refresh()
        return [self._row(point) for point in self.about["points"]]

    def _row(self, point: Mapping[str, Any]) -> Row:
        name = str(point["run"])
        if name in self._ended and self._ended[name]["state"] == "finished":
            return self._ended[name]
        folder = RunFolder(self.folder / name)
        row = {**point, "state": "waiting", "step": 0, "seconds_left": None, "seconds": None, "error": None}
        if is_locked(folder.path / ".lock"):
            row |= {"state": "running", **_progress(folder, int(point["steps"]))}
        elif folder.result.is_file():
            try:
                result = folder.read_result()
            except ConfigError as error:
                return row | {"state": "failed", "error": str(error)}
            row |= {
                "state": result["status"],
                "step": result.get("steps", 0),
                "error": result.get("error"),
                "seconds": duration(folder),
            }
            self._ended[name] = row
        else:
            row |= {"state": "pruned" if point.get("pruned") else "waiting", "step": last_step(folder)}
        return row

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The counts of the states, and the seconds that the rest should take (``None`` where nothing tells)."""
        counts = Counter(row["state"] for row in rows)
        took = [row["seconds"] for row in rows if row["seconds"]]
        lefts = [row["seconds_left"] for row in rows if row["state"] == "running"]
        each = statistics.mean(took) if took else None
        known = all(left is not None for left in lefts) and (each is not None or not counts["waiting"])
        total = sum(left or 0.0 for left in lefts) + counts["waiting"] * (each or 0.0)
        seconds = (
            total / min(int(self.about["jobs"]), max(1, counts["running"] + counts["waiting"]))
            if known
            else None
        )
        return {
            **{state: counts[state] for state in ("finished", "running", "failed", "pruned", "waiting")},
            "seconds_left": seconds,
        }


def _inside(run: str) -> bool:
    """Whether ``run`` is a folder of a sweep, or one of its trials, or empty."""
    *before, name = Path(run).parts or [""]
    return before in ([], [TRIALS]) and name not in ("..", "/")


def _progress(folder: RunFolder, steps: int) -> Row:
    """Of a run that goes on: its step, and the seconds left by the median of the last steps."""
    seconds = [line["seconds"] for line in tail(folder.metrics) if isinstance(line.get("seconds"), float)][
        -TAIL:
    ]
    step = last_step(folder)
    return {"step": step, "seconds_left": statistics.median(seconds) * (steps - step) if seconds else None}


def duration(folder: RunFolder) -> float | None:
    """Seconds from the start of the process that finished a run to its result; ``None`` where that is not known."""
    try:
        started = safe.read_json(folder.path / ".lock", {"started": float})["started"]
        return max(0.0, folder.result.stat().st_mtime - float(started))
    except (OSError, ValueError):
        try:
            return max(0.0, folder.result.stat().st_mtime - yaml_time(folder))
        except OSError:
            return None


def yaml_time(folder: RunFolder) -> float:
    """When a run without a lock, of plain ``finetune train``, began: it writes its configuration then. Raises ``OSError``."""
    return folder.config.stat().st_mtime


def show_seconds(seconds: float | None) -> str:
    """``40 s``, ``12 min``, ``3.5 h``; ``?`` when not known."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
