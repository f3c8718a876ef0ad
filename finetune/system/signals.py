"""What SIGINT, SIGTERM and SIGHUP do to a run: they end it between two steps, or, asked twice, at once. Imports no torch."""

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

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODE = 130  # the exit code of whoever was interrupted
SAME = 1.0  # seconds within which a second signal is the first one's echo: a terminal and a launcher both send theirs
OUTLIVE = 60  # seconds that a process which loads data goes on after SIGTERM


class Interrupted(KeyboardInterrupt):
    """The signal named ``name`` ends the run; ``saved`` says what of it is kept. No ``except Exception`` catches it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name, self.saved = name, ""


class Signals:
    """Inside ``with``, a signal raises ``Interrupted`` at once, or, in ``patient``, is kept for ``check``; a later one ends the process.

    Only the main thread can have that; elsewhere, and for a signal that was ignored from the start (``nohup``), nothing changes.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal that came
        self._at = 0.0
        self._patient = False
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            ours = (number for number in NUMBERS if signal.getsignal(number) not in (signal.SIG_IGN, None))
            self._before = {number: signal.signal(number, self._came) for number in ours}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal came."""
        if self.name:
            raise Interrupted(self.name)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Nothing inside is broken off: who can stop calls ``check``."""
        self._patient = True
        try:
            self.check()
            yield
        finally:
            self._patient = False

    def _came(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a process that was forked to load data
            return
        if self.name and time.monotonic() - self._at > SAME:
            _tell(
                f"{self.name}, and again {signal.Signals(number).name}: ended at once; what was saved before is whole."
            )
            os._exit(CODE)
        if self.name:
            return
        self.name, self._at = signal.Signals(number).name, time.monotonic()
        if not self._patient:
            raise Interrupted(self.name)
        _tell(f"{self.name}: saving the run at the end of this step; once more ends it at once.")


def _tell(line: str) -> None:
    """Past Python's buffers, in the middle of whose work a handler may be called; the cursor, which a progress bar hides, is shown again."""
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        return
    with suppress(OSError):  # after SIGHUP there is no terminal any more
        os.write(2, (("\n\x1b[?25h" if sys.stderr.isatty() else "") + line + "\n").encode())


def outlive(worker: int = 0) -> None:
    """In a process that loads data: a SIGTERM sent to all of a run ends this one only after a minute, so that the run can end its step and save."""

    def later(number: int, frame: FrameType | None) -> None:
        signal.alarm(OUTLIVE)

    signal.signal(signal.SIGTERM, later)
