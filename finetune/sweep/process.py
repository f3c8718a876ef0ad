"""One run in a process of its own: watched, stopped if need be, and never run twice at once. Imports no torch.

A process holds the lock of its run (``RUN/.lock``), and so does its child, which inherits it: whoever is killed, no run can be started a second time
while it still works.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import FinetuneError
from ..launch.forkserver import Forked
from ..launch.start import StartOptions, child_command
from ..storage import lock as locks
from ..storage.atomic import write_json_atomic
from ..storage.result import make_result
from ..storage.run_folder import RunFolder
from ..system.signals import CODE
from .grid import Point

GRACE = 10.0  # seconds between asking a process to end and ending it
FORKS = sys.platform == "linux"  # whether runs on the CPU are forked from a warm process
KEPT = 50  # lines of what a failed process wrote to standard error that go to its log
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}


class DiskFull(FinetuneError):
    """A run could not be written. Nothing that was finished is touched, and the run itself counts as unfinished."""

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(
            f"{folder} cannot be written: {why}. Whatever finished is kept; make room, and the same command goes on."
        )


def lock(folder: Path) -> int | None:
    """Take the lock of a run folder: an open file for ``train.lock.release``; ``None`` if another process has it. Raises ``DiskFull``."""
    try:
        return locks.lock(folder)
    except OSError as error:
        raise DiskFull(folder, error.strerror or str(error)) from None


def again(result: dict[str, Any]) -> bool:
    """Whether a failed run is run again unasked: one that was ended by a signal (memory, a killed job) is, one that failed by itself is not."""
    return result.get("status") != "finished" and bool(result.get("signal"))


def environment(threads: int | None, device: str | None) -> dict[str, str]:
    """The child's variables: at most ``threads`` threads, which do not spin while they wait, and only the CUDA device(s) ``device``."""
    made = dict(os.environ)
    for name in THREADS if threads else ():
        given = made.get(name, "")
        made[name] = str(min(threads or 1, int(given)) if given.isdigit() and int(given) else threads)
    if threads:
        made.setdefault(
            "OMP_WAIT_POLICY", "PASSIVE"
        )  # two processes that spin on the same cores slow each other tenfold
    return made if device is None else {**made, "CUDA_VISIBLE_DEVICES": device}


def command(point: Point, options: StartOptions) -> list[str]:
    """The command that trains ``point``, whose configuration is frozen, in a new process, which ends with this one."""
    return child_command("finetune.launch.child", options, str(point.folder.config))


class Process:
    """One run being trained. ``start`` makes it; ``poll`` is to be called until it gives the result; ``stop`` ends it early.

    ``point`` is the run; ``began`` the time of its start in seconds of ``time.monotonic``.
    """

    def __init__(
        self,
        point: Point,
        held: int,
        options: StartOptions,
        threads: int | None,
        device: str | None,
        warm: bool,
    ) -> None:
        self.point, self.device, self.began = point, device, time.monotonic()
        self._lock, self._said, self._stopped = held, b"", ""
        point.folder.result.unlink(missing_ok=True)  # of an earlier failure
        surroundings = environment(threads, device) | {locks.INHERITED: str(held)}
        self._process: Forked | subprocess.Popen[bytes]
        if warm and FORKS and not device:
            self._process = Forked(str(point.folder.config), options, surroundings, held)
        else:
            self._process = subprocess.Popen(
                command(point, options), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=surroundings,
                pass_fds=(held,), process_group=0,
            )  # fmt: skip
        assert self._process.stderr is not None
        self._pipe = self._process.stderr.fileno()
        os.set_blocking(self._pipe, False)
        locks.sign(self._lock, self._process.pid)

    @classmethod
    def start(
        cls,
        point: Point,
        options: StartOptions,
        threads: int | None = None,
        device: str | None = None,
        warm: bool = False,
    ) -> Process | None:
        """Start ``point``, whose configuration is frozen in its folder; ``None`` if another process is running it, or has
        just finished it. Raises ``DiskFull``.

        ``threads``: how many the child may use; ``device``: its CUDA_VISIBLE_DEVICES; ``warm``: if it may, fork it from a process that has imported
        everything.
        """
        held = lock(point.folder.path)
        if held is None:
            return None
        if point.folder.finished:
            locks.release(held)
            return None
        try:
            return cls(point, held, options, threads, device, warm)
        except BaseException:
            locks.release(held)
            raise

    def poll(self) -> dict[str, Any] | None:
        """``None`` while it runs; then the content of its ``result.json``, a failure included, or ``status`` "stopped" after ``stop``.

        A failure that the process did not record itself is written here, with ``signal`` if a signal ended it. Raises ``DiskFull``.
        """
        self._listen()
        if self._process.poll() is None:
            return None
        self._listen()
        try:
            return self._outcome()
        finally:
            self._close()

    def ask_to_stop(self, why: str) -> None:
        """Send SIGTERM to it and to whatever it started, once: a second one would end it before it has saved. ``poll`` tells when it has ended."""
        if not self._stopped:
            self._stopped = why
            self._signal(signal.SIGTERM)

    def stop(self, why: str, grace: float = GRACE) -> dict[str, Any]:
        """End it, by SIGKILL after ``grace`` seconds, and return ``{"status": "stopped", "error": why}``. It can be run again later."""
        self.ask_to_stop(why)
        end = time.monotonic() + grace
        while (result := self.poll()) is None:
            if time.monotonic() > end:
                self._signal(signal.SIGKILL)
            time.sleep(0.02)
        return result

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError):
                self._process.send_signal(number)

    def _listen(self) -> None:
        """Take what it wrote to standard error, and keep the end of it."""
        try:
            while read := os.read(self._pipe, 65536):
                self._said = (self._said + read)[-65536:]
        except BlockingIOError:
            pass

    def _close(self) -> None:
        assert self._process.stderr is not None
        self._process.stderr.close()
        locks.release(self._lock)

    def _outcome(self) -> dict[str, Any]:
        folder, code = self.point.folder, self._process.returncode or 0
        if folder.finished:
            return folder.read_result()
        if self._stopped:
            return {"status": "stopped", "error": self._stopped}
        error = _reason(code, self._said.decode(errors="replace"))
        full = next((why for why in FULL.values() if why in error), None)
        if full or shutil.disk_usage(folder.path).free == 0:
            raise DiskFull(folder.path, full or FULL[errno.ENOSPC])
        try:
            self._keep_words(folder)
            if not folder.result.exists():
                result = make_result(self.point.config, status="failed", error=error, steps=last_step(folder))
                number = -code if code < 0 else int(signal.SIGTERM) if code == CODE else 0
                write_json_atomic(folder.result, result | ({"signal": number} if number else {}))
        except OSError as problem:
            raise DiskFull(folder.path, problem.strerror or str(problem)) from None
        return folder.read_result() | {"exit_code": code}

    def _keep_words(self, folder: RunFolder) -> None:
        """Add what it wrote to standard error, and has not said to its log, to that."""
        there = folder.log.read_text(encoding="utf-8", errors="replace") if folder.log.exists() else ""
        lines = [line.rstrip() for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        with folder.log.open("a", encoding="utf-8") as file:
            file.writelines(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
                for line in lines[-KEPT:]
                if line not in there
            )


def tail(file: Path) -> list[dict[str, Any]]:
    """The last lines of a file of JSON objects, none if there is no file; a torn line is left out."""
    found = []
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - 65536))
            lines = handle.read().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [line for line in found if isinstance(line, dict)]


def last_step(folder: RunFolder) -> int:
    """The last step in ``metrics.jsonl``, 0 if there is none."""
    return next(
        (int(line["step"]) for line in reversed(tail(folder.metrics)) if isinstance(line.get("step"), int)), 0
    )


def run_to_end(
    point: Point, options: StartOptions, threads: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Run one point, wait for it, and return its result; waits first while another process runs it. Raises ``DiskFull``."""
    while (process := Process.start(point, options, threads, device)) is None:
        if point.folder.finished:
            return point.folder.read_result()
        time.sleep(0.1)
    try:
        while (result := process.poll()) is None:
            time.sleep(0.1)
        return result
    except BaseException as error:
        process.stop(str(error) or type(error).__name__)
        raise


def _reason(code: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code == CODE:
        return "the process was asked to end, and saved its state"
    faults = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    if code < 0:
        return f"the process was ended by signal {-code} ({signal.Signals(-code).name})" + (
            " (out of memory?)" if code == -9 else ""
        )
    return " ".join(faults) or (lines[-1] if lines else f"exit code {code}")
