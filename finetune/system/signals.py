"""Handle SIGINT, SIGTERM and SIGHUP: the first one ends a run between two steps, a second one at once.

Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from .environment import rank
from .exit_code import INTERRUPTED

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME = 1.0  # seconds within which a second signal counts as the first one, passed on by the launcher
OUTLIVE = 60  # seconds that a data-loading process survives SIGTERM


class Interrupted(KeyboardInterrupt):
    """The signal ``name`` ends the run; ``saved`` tells what is kept. No ``except Exception`` catches it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name, self.saved = name, ""


class Signals:
    """Raise ``Interrupted`` on a signal: at once inside ``with``, at the next ``check`` inside ``deferring``.

    A second signal, more than a second later, ends the process. Signals that were ignored from the start
    (``nohup``) stay ignored. Only the main thread can handle signals; in another thread nothing changes.
    """

    def __init__(self) -> None:
        self.name = ""  # the signal that was received
        self._at = 0.0
        self._deferring = False
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal was received."""
        if self.name:
            raise Interrupted(self.name)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Defer signals inside the block, which calls ``check`` where it can stop."""
        self._deferring = True
        try:
            self.check()
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a process that was forked to load data
            return
        name = signal.Signals(number).name
        if self.name:
            if time.monotonic() - self._at > SAME:
                _write(f"{self.name}, then {name}: ended at once; everything saved before is complete.")
                os._exit(INTERRUPTED)
            return
        self.name, self._at = name, time.monotonic()
        if not self._deferring:
            raise Interrupted(self.name)
        _write(f"{self.name}: saving the run at the end of this step; a second signal ends it at once.")


def _write(line: str) -> None:
    """Write a line to standard error by its descriptor: a handler may interrupt Python's buffered writer.

    A terminal's cursor, which a progress bar hides, is shown again. Only rank 0 writes.
    """
    if rank() != 0:
        return
    show_cursor = "\n\x1b[?25h" if sys.stderr.isatty() else ""
    with suppress(OSError):  # after SIGHUP the terminal is gone
        os.write(2, f"{show_cursor}{line}\n".encode())


def delay_sigterm(worker: int = 0) -> None:
    """Keep this data-loading process alive for a minute after SIGTERM.

    When the whole process group gets SIGTERM, the run can still finish its step and save.
    """

    def end_later(number: int, frame: FrameType | None) -> None:
        signal.alarm(OUTLIVE)

    signal.signal(signal.SIGTERM, end_later)
