"""Run several points at once, each in a process with a share of the cores or with a GPU. Imports no torch."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import ConfigError
from ..launch.start import NO_OPTIONS, StartOptions
from ..storage.lock import lock_holder
from ..system.environment import count_cores, cuda_devices
from .grid import Point
from .process import GRACE, DiskFull, Process, should_rerun

Say = Callable[[str], None]
Result = dict[str, Any]
PAUSE = 0.05  # seconds between two checks of the processes


class Interrupted(KeyboardInterrupt):
    """A signal (SIGINT, SIGTERM or SIGHUP) came; the active runs were ended and can be resumed."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise like Ctrl-C inside the block, so that children are ended.

    Only the main thread can handle signals; in another thread nothing changes.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _no_update(pool: Pool) -> None:
    """Do nothing: the default of ``Pool.update``."""


class Pool:
    """Runs points, at most ``jobs`` at once; with GPUs at most one on each of them.

    ``say`` is called with one line for every start and end. ``retry``: repeat runs that failed before; a run
    that a signal ended is repeated in any case. ``attempts``: how often a run may be started before it
    counts as failed. ``fail_fast``: after a failure, start no more runs and end those that run. ``update`` is
    called with the pool about every 0.05 s. ``gpus``: values for CUDA_VISIBLE_DEVICES, by default all GPUs;
    an empty list for runs on the CPU. ``options`` hold in every child.

    ``places`` is how many points can run at once, ``running`` lists the processes, and ``failed`` tells
    whether a run failed.
    """

    def __init__(
        self,
        jobs: int | None,
        say: Say,
        *,
        retry: bool = False,
        attempts: int = 1,
        fail_fast: bool = False,
        update: Callable[[Pool], None] = _no_update,
        gpus: Sequence[str] | None = None,
        options: StartOptions = NO_OPTIONS,
    ) -> None:
        self._free_gpus = list(cuda_devices() if gpus is None else gpus)
        self._hide_gpus = gpus is not None and not gpus
        if self._free_gpus:
            self.places = min(jobs or len(self._free_gpus), len(self._free_gpus))
        else:
            self.places = jobs or 1
        self._threads = max(1, count_cores() // self.places)
        self._say, self._update, self._options = say, update, options
        self._retry, self._attempts, self._fail_fast = retry, attempts, fail_fast
        self.running: list[Process] = []
        self.results: dict[Path, Result] = {}
        self.failed = False
        self._ended: Callable[[Point, Result], None]
        self._verdict: Callable[[Point], str | None]
        self._waiting: list[Point] = []  # points to try again, and points that another process runs now
        self._tries: dict[Path, int] = {}
        self._numbers: dict[Path, int] = {}  # of the points, in the order of their arrival
        self._busy_since: dict[Path, float] = {}
        self._total = ""

    def run(
        self,
        points: Iterable[Point | None],
        ended: Callable[[Point, Result], None] = lambda point, result: None,
        verdict: Callable[[Point], str | None] = lambda point: None,
    ) -> dict[Path, Result]:
        """Run all ``points`` and return the result of each by its folder; a failure is a result too.

        The next point is taken from ``points`` only when there is a place for it, so a generator can base its
        points on earlier results; it yields ``None`` while it has none. Configurations must be frozen
        (``grid.freeze``). Finished points are not run again. ``ended`` is called with each point and its
        result. ``verdict`` is called at every check of a running point; a text that it returns stops the
        point, whose result is then ``{"status": "stopped", "error": text}``.

        Raises ``Interrupted`` and ``DiskFull``, each when all processes have ended.
        """
        self._ended, self._verdict = ended, verdict
        self._total = f"/{len(points)}" if isinstance(points, Sized) else ""
        source, more = iter(points), True
        try:
            with interruptible():
                while more or self._waiting or self.running:
                    self._collect()
                    if self._fail_fast and self.failed:
                        self._say("Stopped at the first failure, as --fail-fast says.")
                        break
                    self._waiting = [point for point in self._waiting if not self._begin(point)]
                    more = more and self._fill(source)
                    self._update(self)
                    time.sleep(PAUSE)
        finally:
            self._end_all()
        return self.results

    def _collect(self) -> None:
        """Take the results of processes that have ended, and stop those that ``verdict`` stops."""
        for process in list(self.running):
            try:
                result = process.poll()
            except DiskFull:
                self.running.remove(process)
                raise
            if result is None and (why := self._verdict(process.point)):
                result = process.stop(why)
            if result is not None:
                self.running.remove(process)
                if process.device:
                    self._free_gpus.append(process.device)
                self._take(process, result)

    def _take(self, process: Process, result: Result) -> None:
        """Record the result of a process, or queue its point for another attempt."""
        point, code, status = process.point, result.pop("exit_code", 0), result["status"]
        why = "" if status == "finished" else f" ({result['error']})"
        curable = code != ConfigError.exit_code  # another attempt does not cure a mistake of the user
        if status == "failed" and curable and self._tries[point.folder.path] < self._attempts:
            self._report(point, f"failed{why}, tried again")
            self._waiting.append(point)
            return
        self.failed |= status == "failed"
        self._report(point, f"{status}{why} after {time.monotonic() - process.began:.0f} s")
        self._record(point, result)

    def _record(self, point: Point, result: Result) -> None:
        self.results[point.folder.path] = result
        self._ended(point, result)

    def _fill(self, source: Iterator[Point | None]) -> bool:
        """Take points from ``source`` while there is a place; return whether there may be more."""
        while len(self.running) < self.places:
            try:
                point = next(source)
            except StopIteration:
                return False
            if point is None:
                return True
            self._numbers.setdefault(point.folder.path, len(self._numbers) + 1)
            if not self._begin(point):
                self._waiting.append(point)
        return True

    def _begin(self, point: Point) -> bool:
        """Take an existing result, or start the run; return whether one of the two was possible."""
        if self._take_earlier(point):
            return True
        if len(self.running) >= self.places:
            return False
        device = self._free_gpus.pop() if self._free_gpus else None
        visible = "" if self._hide_gpus else device
        process = Process.start(point, self._options, self._threads, visible, fork=True)
        if process is None:
            if device:
                self._free_gpus.append(device)
            self._report_busy(point)
            return False
        folder = point.folder.path
        self._tries[folder] = self._tries.get(folder, 0) + 1
        self.running.append(process)
        self._report(point, f"running on GPU {device}" if device else "running")
        return True

    def _take_earlier(self, point: Point) -> bool:
        """Take an earlier sweep's result unless the point is to be run again; return whether it was taken."""
        if not point.folder.result.is_file():
            return False
        result = point.folder.read_result()
        if result["status"] == "finished":
            self._report(point, "finished before, skipped")
        elif point.folder.path in self._tries or self._retry or should_rerun(result):
            return False
        else:
            self._report(point, f"failed before ({result['error']}), kept: see --retry")
        self._record(point, result)
        return True

    def _report_busy(self, point: Point) -> None:
        """Say once that another process runs a point, if that process still holds the lock after a second.

        A process that only reads the state of a run holds the lock for a moment, too.
        """
        folder, now = point.folder.path, time.monotonic()
        if now - self._busy_since.setdefault(folder, now) > 1:
            self._busy_since[folder] = float("inf")
            self._report(point, f"is being run by {lock_holder(folder) or 'another process'}; waiting for it")

    def _report(self, point: Point, words: str) -> None:
        number = self._numbers.get(point.folder.path, 0)
        self._say(f"[{number}{self._total}] {point.folder.path.name}: {words}")

    def _end_all(self) -> None:
        """End the processes by SIGTERM, and by SIGKILL after ``GRACE`` seconds or on another signal."""
        for process in self.running:
            process.ask_to_stop("interrupted")
        grace = GRACE
        while self.running:
            try:
                self.running[-1].stop("interrupted", grace)
                self.running.pop()
            except KeyboardInterrupt:
                grace = 0.0
