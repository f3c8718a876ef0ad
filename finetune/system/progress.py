"""How far a run is: a bar with the time left on a terminal, a few plain lines elsewhere. Both go to standard error."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import visible

if TYPE_CHECKING:
    from rich.progress import Progress

LINES = 10  # how many plain lines a whole run prints


class ProgressBar:
    """A context manager that is called with steps done, steps in total, and a few words.

    Nothing appears before the first call. ``say`` prints a line without tearing the bar.
    """

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._start: tuple[float, int] | None = None
        self._shown = -1

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int, words: str = "") -> None:
        if self.live:
            self._draw(done, total, words)
        else:
            self._print(done, total, words)

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        line = visible(line)
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            with suppress(OSError):  # a terminal that is gone is no reason to stop
                print(f"{line}\n", end="", file=sys.stderr, flush=True)  # in one piece, whatever signal comes

    def _draw(self, done: int, total: int, words: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(
                *columns, TextColumn("{task.description}", markup=False), console=Console(stderr=True)
            )
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=words)

    def _print(self, done: int, total: int, words: str) -> None:
        now = time.perf_counter()
        self._start = self._start or (now, done)
        part = done * LINES // max(total, 1)
        if part == self._shown:
            return
        self._shown = part
        began, first = self._start
        left = (
            f", about {(now - began) / (done - first) * (total - done):.0f} s left"
            if done > first and done < total
            else ""
        )
        self.say(f"step {done}/{total}{left}{words and f', {words}'}")
