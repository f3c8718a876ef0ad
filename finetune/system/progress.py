"""Show on standard error how far a run is: by a bar on a terminal, by a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import make_printable

if TYPE_CHECKING:
    from rich.progress import Progress

LINES = 10  # number of plain lines that a whole run prints


class ProgressBar:
    """A context manager that is called with the steps done, the steps in total, and a few words.

    Nothing appears before the first call. ``say`` prints a line without tearing the bar.
    """

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._start: tuple[float, int] | None = None  # time and step of the first call
        self._printed = -1  # tenths of the run that were done at the last plain line

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int, words: str = "") -> None:
        if self.on_terminal:
            self._draw(done, total, words)
        else:
            self._print(done, total, words)

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        line = make_printable(line)
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
            return
        with suppress(OSError):  # a run continues without its terminal
            # One write for text and newline: a signal cannot come between them.
            print(f"{line}\n", end="", file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int, words: str) -> None:
        if self._bar is None:
            self._bar = _make_bar()
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=words)

    def _print(self, done: int, total: int, words: str) -> None:
        now = time.perf_counter()
        if self._start is None:
            self._start = (now, done)
        part = done * LINES // max(total, 1)
        if part == self._printed:
            return
        self._printed = part
        line = f"step {done}/{total}"
        began, first = self._start
        if first < done < total:
            seconds_left = (now - began) / (done - first) * (total - done)
            line += f", about {seconds_left:.0f} s left"
        if words:
            line += f", {words}"
        self.say(line)


def _make_bar() -> Progress:
    """Return a bar of rich that shows steps, time taken, time left and the words."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
    )
