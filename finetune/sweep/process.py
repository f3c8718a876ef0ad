"""Run one point in a process of its own: watch it, stop it on request, and never run it twice at once.

A ``Process`` holds the lock of its run (``RUN/.lock``), and its child inherits that lock. If one of the two
is killed, the run cannot be started a second time while the other still lives. Imports no torch.
"""

from __future__ import annotations

import errno
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
from ..storage.atomic import write_json_atomic
from ..storage.lock import INHERITED, release_lock, sign_lock, try_lock
from ..storage.result import make_result
from ..storage.run_folder import RunFolder
from ..system.environment import child_environment
from ..system.exit_code import INTERRUPTED
from .grid import Point
from .lines import last_step

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
FORKS = sys.platform == "linux"  # whether runs on the CPU are forked from the fork server
LOG_LINES = 50  # lines of a failed process's standard error that go to the run's log
STDERR_BYTES = 65536  # bytes of standard error that are kept
DISK_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}


class DiskFull(FinetuneError):
    """A run could not be written. Finished runs are untouched, and the run itself counts as unfinished."""

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(
            f"{folder} cannot be written: {why}. Finished runs are kept; make room, and the same command "
            "continues."
        )


def take_lock(folder: Path) -> int | None:
    """Take the lock of a run folder and return its descriptor; ``None`` if another process has it.

    Raises ``DiskFull`` if the lock cannot be written.
    """
    try:
        return try_lock(folder)
    except OSError as error:
        raise DiskFull(folder, error.strerror or str(error)) from None


def should_rerun(result: dict[str, Any]) -> bool:
    """Tell whether a failed run is run again without ``--retry``.

    True if a signal ended the run (out of memory, a killed job); false if the run failed by itself.
    """
    return result.get("status") != "finished" and bool(result.get("signal"))


def run_command(point: Point, options: StartOptions) -> list[str]:
    """Return the command that trains ``point``, whose configuration is frozen, in a fresh process."""
    return child_command("finetune.launch.child", options, str(point.folder.config))


class Process:
    """A run that a child trains. Call ``start``, then ``poll`` until it returns the result, or ``stop``.

    ``point`` is the run, ``device`` its CUDA device, ``began`` the time of its start by ``time.monotonic``.
    """

    def __init__(
        self,
        point: Point,
        lock: int,
        options: StartOptions,
        threads: int | None,
        device: str | None,
        fork: bool,
    ) -> None:
        self.point, self.device, self.began = point, device, time.monotonic()
        self._lock = lock
        self._stderr = b""  # the end of what the child wrote
        self._stopped = ""  # why it was stopped
        point.folder.result.unlink(missing_ok=True)  # left by an earlier failure
        environment = child_environment(threads, device) | {INHERITED: str(lock)}
        self._process: Forked | subprocess.Popen[bytes]
        if fork and FORKS and not device:
            self._process = Forked(str(point.folder.config), options, environment, lock)
        else:
            self._process = subprocess.Popen(
                run_command(point, options),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                pass_fds=(lock,),
                process_group=0,
            )
        assert self._process.stderr is not None
        self._pipe = self._process.stderr.fileno()
        os.set_blocking(self._pipe, False)
        sign_lock(self._lock, self._process.pid)

    @classmethod
    def start(
        cls,
        point: Point,
        options: StartOptions,
        threads: int | None = None,
        device: str | None = None,
        fork: bool = False,
    ) -> Process | None:
        """Start ``point``, whose configuration is frozen in its folder.

        Returns ``None`` if another process is running it or has just finished it. Raises ``DiskFull``.

        ``threads``: how many the child may use. ``device``: its CUDA_VISIBLE_DEVICES. ``fork``: fork it from
        the fork server where that is possible.
        """
        lock = take_lock(point.folder.path)
        if lock is None:
            return None
        if point.folder.finished:
            release_lock(lock)
            return None
        try:
            return cls(point, lock, options, threads, device, fork)
        except BaseException:
            release_lock(lock)
            raise

    def poll(self) -> dict[str, Any] | None:
        """Return ``None`` while the child runs, then the content of ``result.json``.

        A failure that the child did not record is recorded here, with ``signal`` if a signal ended it. After
        ``stop`` the result is ``{"status": "stopped", "error": why}``. Raises ``DiskFull``.
        """
        self._read_stderr()
        if self._process.poll() is None:
            return None
        self._read_stderr()
        try:
            return self._result()
        finally:
            self._close()

    def ask_to_stop(self, why: str) -> None:
        """Send SIGTERM to the child's process group, once: a second one would end it before it has saved."""
        if not self._stopped:
            self._stopped = why
            self._signal(signal.SIGTERM)

    def stop(self, why: str, grace: float = GRACE) -> dict[str, Any]:
        """End the child, after ``grace`` seconds by SIGKILL; return the result. The run can be resumed."""
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

    def _read_stderr(self) -> None:
        """Read what the child has written to standard error, without waiting for more."""
        try:
            while read := os.read(self._pipe, STDERR_BYTES):
                self._stderr = (self._stderr + read)[-STDERR_BYTES:]
        except BlockingIOError:
            pass

    def _close(self) -> None:
        assert self._process.stderr is not None
        self._process.stderr.close()
        release_lock(self._lock)

    def _result(self) -> dict[str, Any]:
        """Return the result of the child, which has ended."""
        folder, code = self.point.folder, self._process.returncode or 0
        if folder.finished:
            return folder.read_result()
        if self._stopped:
            return {"status": "stopped", "error": self._stopped}
        text = self._stderr.decode(errors="replace")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        error = _error_of(code, lines)
        for why in DISK_FULL.values():
            if why in error:
                raise DiskFull(folder.path, why)
        if shutil.disk_usage(folder.path).free == 0:
            raise DiskFull(folder.path, DISK_FULL[errno.ENOSPC])
        try:
            _add_to_log(folder, lines[-LOG_LINES:])
            if not folder.result.exists():
                result = make_result(self.point.config, status="failed", error=error, steps=last_step(folder))
                if number := _signal_of(code):
                    result |= {"signal": number}
                write_json_atomic(folder.result, result)
        except OSError as problem:
            raise DiskFull(folder.path, problem.strerror or str(problem)) from None
        return folder.read_result() | {"exit_code": code}


def _signal_of(code: int) -> int:
    """Return the signal behind an exit code, or 0; SIGTERM if the child saved its state and exited."""
    if code == INTERRUPTED:
        return int(signal.SIGTERM)
    return max(0, -code)


def _error_of(code: int, lines: list[str]) -> str:
    """Return why a child failed, from its exit code and the lines of its standard error."""
    if code == INTERRUPTED:
        return "the process was asked to end, and saved its state"
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"the process was ended by signal {-code} ({signal.Signals(-code).name}){hint}"
    faults = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    if faults:
        return " ".join(faults)
    return lines[-1].strip() if lines else f"exit code {code}"


def _add_to_log(folder: RunFolder, lines: list[str]) -> None:
    """Append to the run's log those of ``lines`` that it does not contain yet."""
    there = folder.log.read_text(encoding="utf-8", errors="replace") if folder.log.exists() else ""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with folder.log.open("a", encoding="utf-8") as file:
        for line in lines:
            if line not in there:
                file.write(f"{now} {line}\n")


def run_to_end(
    point: Point, options: StartOptions, threads: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Run one point in a fresh process and return its result; wait while another process runs it.

    Raises ``DiskFull``.
    """
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
