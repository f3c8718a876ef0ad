"""Several runs at once, each in a process of its own with its share of the cores or a GPU of its own. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..launch.start import NO_OPTIONS, StartOptions
from ..storage.lock import holder
from ..system.environment import cores
from .grid import Point
from .process import GRACE, DiskFull, Process, again

Say = Callable[[str], None]
Result = dict[str, Any]
PAUSE = 0.05  # seconds between looks at the processes
MISTAKE = 2  # the exit code of a mistake of the user's, which trying again does not cure


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came while runs were going; they have been ended and can be gone on with."""


def devices() -> list[str]:
    """The CUDA devices that runs may be given: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists. Imports no torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in (part.strip() for part in given.split(",")) if name and name != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()]
        if done.returncode == 0
        else []
    )


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise like Ctrl-C inside the block, so that children are ended. Only the main thread can have that."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Pool:
    """Runs points, at most ``jobs`` at once; with GPUs at most as many as there are, each with its own.

    ``say`` takes one line for every start and end. ``retry``: run again what had failed before; what a signal ended always is.
    ``attempts``: how often a run may be started before it counts as failed. ``fail_fast``: start nothing more after a failure, and end what runs.
    ``look`` is called about every 0.05 s with the pool, whose ``running`` lists the processes and whose ``places`` is how many there can be.
    ``failed`` tells whether a run did.
    ``gpus``: names for CUDA_VISIBLE_DEVICES, by default all there are; an empty list for runs on the CPU.
    """

    def __init__(
        self, jobs: int | None, say: Say, *, retry: bool = False, attempts: int = 1, fail_fast: bool = False,
        look: Callable[[Pool], None] = lambda pool: None, gpus: Sequence[str] | None = None,
        options: StartOptions = NO_OPTIONS,
    ) -> None:  # fmt: skip
        self._free = list(devices() if gpus is None else gpus)
        self.places = min(jobs or len(self._free), len(self._free)) if self._free else jobs or 1
        self._threads = max(1, cores() // self.places)
        self._without = "" if gpus is not None and not gpus else None
        self._say, self._retry, self._attempts, self._fail_fast, self._look = (
            say,
            retry,
            attempts,
            fail_fast,
            look,
        )
        self._options = options
        self.running: list[Process] = []
        self.results: dict[Path, Result] = {}
        self._queue: list[Point] = []  # begun by another process, or to be tried again
        self._tries: dict[Path, int] = {}
        self._numbers: dict[Path, int] = {}
        self._busy: dict[Path, float] = {}
        self._total = ""
        self.failed = False

    def run(
        self,
        points: Iterable[Point | None],
        ended: Callable[[Point, Result], None] = lambda point, result: None,
        verdict: Callable[[Point], str | None] = lambda point: None,
    ) -> dict[Path, Result]:
        """Run all ``points`` and return the result of each by its folder; a failure is a result too.

        ``points`` is asked for the next one only when there is a place for it, so a generator can choose it by what ``ended`` told; it may give
        ``None`` for "not yet". Their configurations must be frozen (``grid.freeze``). ``verdict`` is asked about each running point at every look; a
        text stops its process, and its result is ``{"status": "stopped", "error": text}``. What is finished is not run again.

        Raises ``Interrupted`` and ``DiskFull`` when all processes have ended.
        """
        self._total = f"/{len(points)}" if isinstance(points, Sized) else ""
        source, more = iter(points), True
        try:
            with interruptible():
                while more or self._queue or self.running:
                    self._collect(ended, verdict)
                    if self._fail_fast and self.failed:
                        self._say("Stopped at the first failure, as --fail-fast says.")
                        break
                    self._queue = [point for point in self._queue if not self._settle(point, ended)]
                    more = more and self._fill(source, ended)
                    self._look(self)
                    time.sleep(PAUSE)
        finally:
            self._end_all()
        return self.results

    def _collect(
        self, ended: Callable[[Point, Result], None], verdict: Callable[[Point], str | None]
    ) -> None:
        """Take the results of the processes that have ended, and stop those that are to be."""
        for process in list(self.running):
            try:
                result = process.poll()
            except DiskFull:
                self.running.remove(process)
                raise
            if result is None and (why := verdict(process.point)):
                result = process.stop(why)
            if result is not None:
                self.running.remove(process)
                self._free += [process.device] if process.device else []
                self._take(process, result, ended)

    def _take(self, process: Process, result: Result, ended: Callable[[Point, Result], None]) -> None:
        """Record what became of a process, or have it tried again."""
        point, code = process.point, result.pop("exit_code", 0)
        why = f" ({result['error']})" if result["status"] != "finished" else ""
        if (
            result["status"] == "failed"
            and code != MISTAKE
            and self._tries[point.folder.path] < self._attempts
        ):
            self._tell(point, f"failed{why}, tried again")
            self._queue.append(point)
            return
        self.failed |= result["status"] == "failed"
        self._tell(point, f"{result['status']}{why} after {time.monotonic() - process.began:.0f} s")
        self.results[point.folder.path] = result
        ended(point, result)

    def _fill(self, source: Iterator[Point | None], ended: Callable[[Point, Result], None]) -> bool:
        """Ask for points while there is a place; whether there may be more."""
        while len(self.running) < self.places:
            try:
                point = next(source)
            except StopIteration:
                return False
            if point is None:
                return True
            self._numbers.setdefault(point.folder.path, len(self._numbers) + 1)
            if not self._settle(point, ended):
                self._queue.append(point)
        return True

    def _settle(self, point: Point, ended: Callable[[Point, Result], None]) -> bool:
        """Take the result that is there already, or start the run; whether either could be done."""
        folder = point.folder.path
        if point.folder.result.is_file():
            result = point.folder.read_result()
            if result["status"] == "finished" or not (folder in self._tries or self._retry or again(result)):
                kept = (
                    "finished before, skipped"
                    if result["status"] == "finished"
                    else f"failed before ({result['error']}), kept: see --retry"
                )
                self._tell(point, kept)
                self.results[folder] = result
                ended(point, result)
                return True
        if len(self.running) >= self.places:
            return False
        device = self._free.pop() if self._free else None
        process = Process.start(point, self._options, self._threads, device or self._without, warm=True)
        if process is None:
            self._free += [device] if device else []
            self._tell_busy(point)
            return False
        self._tries[folder] = self._tries.get(folder, 0) + 1
        self.running.append(process)
        self._tell(point, "running" + (f" on GPU {device}" if device else ""))
        return True

    def _tell_busy(self, point: Point) -> None:
        """Say once that another process runs a point, if it still does after a second: who only looks has the lock for a moment, too."""
        folder, now = point.folder.path, time.monotonic()
        since = self._busy.setdefault(folder, now)
        if now - since > 1:
            self._busy[folder] = float("inf")
            self._tell(point, f"is being run by {holder(folder) or 'another process'}; waiting for it")

    def _tell(self, point: Point, words: str) -> None:
        self._say(
            f"[{self._numbers.get(point.folder.path, 0)}{self._total}] {point.folder.path.name}: {words}"
        )

    def _end_all(self) -> None:
        """End the processes: by SIGTERM, then, or at once when interrupted again, by SIGKILL."""
        for process in self.running:
            process.ask_to_stop("interrupted")
        grace = GRACE
        while self.running:
            try:
                self.running[-1].stop("interrupted", grace)
                self.running.pop()
            except KeyboardInterrupt:
                grace = 0.0
