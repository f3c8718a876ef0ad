"""Show a sweep as a live table on a terminal, and as a few plain lines elsewhere. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import make_printable
from .status import RunState, Status, show_seconds

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

FAILED_ROWS = 12  # failed runs in the table: the last ones of the grid
INTERVAL = 1.0  # seconds between two readings


class Board:
    """A context manager that shows the state of a sweep on standard error if that is a terminal.

    ``say`` prints a line above the table. Without a terminal, there are only these lines.
    """

    def __init__(self) -> None:
        self._live: Live | None = None
        self._status: Status | None = None
        self._next = 0.0

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live and self._status:
            self._live.update(table(self._status, self._status.states()))
            self._live.stop()

    def say(self, line: str) -> None:
        """Print one line. Above a table, only problems are printed, because the table shows the rest."""
        if self._live is None:
            print(line, file=sys.stderr, flush=True)
        elif "failed" in line or "Stopped" in line:
            self._live.console.print(line, markup=False, highlight=False)

    def show(self, folder: Path) -> None:
        """Begin to show the table of the sweep in ``folder``; do nothing where there is no terminal."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        self._status = Status(folder)
        self._live = Live(console=Console(stderr=True), refresh_per_second=4)
        self._live.start()

    def update(self, *_: Any) -> None:
        """Read the files again and update the table, at most once a second."""
        if self._live and self._status and time.monotonic() >= self._next:
            self._next = time.monotonic() + INTERVAL
            self._live.update(table(self._status, self._status.states()))


def table(status: Status, states: Sequence[RunState]) -> Group:
    """Return a table of the runs that failed or are running, with the counts of all runs below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    failed = [state for state in states if state.state == "failed"]
    running = [state for state in states if state.state == "running"]
    found = Table("run", "seed", "state", "step", "left")
    for state in [*failed[-FAILED_ROWS:], *running]:
        words, left = "running", show_seconds(state.seconds_left)
        if state.state == "failed":
            words, left = f"failed: {state.error}", ""
        cells = (state.label, str(state.seed), words, f"{state.step}/{state.steps}", left)
        found.add_row(*[Text(make_printable(cell)) for cell in cells])
    counts = Text(summary_line(status, states))
    if found.row_count:
        return Group(found, counts)
    return Group(counts)


def summary_line(status: Status, states: Sequence[RunState]) -> str:
    """Write the counts of the states, the time left and the time taken in one line."""
    summary = status.summary(states)
    counts = [f"{summary['finished']} finished"]
    for name in ("running", "failed", "pruned", "waiting"):
        if summary[name]:
            counts.append(f"{summary[name]} {name}")
    left = ""
    if summary["running"] + summary["waiting"]:
        left = f", about {show_seconds(summary['seconds_left'])} left"
    took = show_seconds(status.seconds)
    return f"{status.folder}: {', '.join(counts)} of {len(states)}{left} (for {took})"


def watch(folder: Path, say: Callable[[str], None] = print) -> int:
    """Show the sweep in ``folder`` until it ends; return 0, or 1 if runs failed or are not finished.

    Without a terminal, a line is printed whenever the counts change. Raises ``ConfigError`` if ``folder``
    holds no sweep.
    """
    status, before = Status(folder), list[str]()
    with Board() as board:
        board.show(folder)
        while True:
            alive, states = status.alive, status.states()
            names = [state.state for state in states]
            if not sys.stderr.isatty() and names != before:
                say(summary_line(status, states))
            before = names
            board.update()
            if not alive:
                break
            time.sleep(INTERVAL)
    unfinished = names.count("waiting") + names.count("running")
    if unfinished:
        command = make_printable(str(status.about.get("command", "the same command")))
        say(
            f"No sweep is running in {folder}, and {unfinished} of its runs are not finished. "
            f"To continue: {command}"
        )
    return 1 if unfinished or "failed" in names else 0
