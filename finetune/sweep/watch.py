"""A sweep as a live table on a terminal, and as a few plain lines elsewhere. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import visible
from .status import Row, Status, show_seconds

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

SHOWN = 12  # failed runs in the table, the latest of the grid
EVERY = 1.0  # seconds between two readings


class Board:
    """A context manager that shows the state of a sweep on standard error, where that is a terminal; ``say`` prints lines above it."""

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
            self._live.update(table(self._status, self._status.rows()))
            self._live.stop()

    def say(self, line: str) -> None:
        """Print one line; with the table, which shows as much, only what went wrong."""
        if self._live is None:
            print(line, file=sys.stderr, flush=True)
        elif "failed" in line or "Stopped" in line:
            self._live.console.print(line, markup=False, highlight=False)

    def show(self, folder: Path) -> None:
        """Begin with the table of ``folder``, or do nothing where no terminal is."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        self._status = Status(folder)
        self._live = Live(console=Console(stderr=True), refresh_per_second=4)
        self._live.start()

    def look(self, *_: Any) -> None:
        """Read the files again, at most once a second."""
        if self._live and self._status and time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            self._live.update(table(self._status, self._status.rows()))


def table(status: Status, rows: Sequence[Row]) -> Group:
    """What runs and what failed, a line each, and the counts of all."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table("run", "seed", "state", "step", "left")
    failed = [row for row in rows if row["state"] == "failed"][-SHOWN:]
    for row in [*failed, *(row for row in rows if row["state"] == "running")]:
        words = f"failed: {row['error']}" if row["state"] == "failed" else "running"
        left = "" if row["state"] == "failed" else show_seconds(row["seconds_left"])
        made.add_row(
            *(
                Text(visible(text))
                for text in (row["label"], str(row["seed"]), words, f"{row['step']}/{row['steps']}", left)
            )
        )
    return Group(*([made] if made.row_count else []), Text(line(status, rows)))


def line(status: Status, rows: Sequence[Row]) -> str:
    """The counts in one line."""
    told = status.summary(rows)
    rest = f", about {show_seconds(told['seconds_left'])} left" if told["running"] + told["waiting"] else ""
    counts = ", ".join(
        f"{told[state]} {state}"
        for state in ("finished", "running", "failed", "pruned", "waiting")
        if told[state] or state == "finished"
    )
    return f"{status.folder}: {counts} of {len(rows)}{rest} (for {show_seconds(status.seconds)})"


def watch(folder: Path, say: Callable[[str], None] = print) -> int:
    """Show the sweep in ``folder`` until it ends; 0, or 1 if runs failed. Elsewhere than on a terminal, a line whenever the counts change.

    Raises ``ConfigError`` when ``folder`` holds no sweep.
    """
    status, before = Status(folder), ""
    with Board() as board:
        board.show(folder)
        while True:
            alive, rows = status.alive, status.rows()
            counts = str([row["state"] for row in rows])
            if not sys.stderr.isatty() and counts != before:
                say(line(status, rows))
            before = counts
            board.look()
            if not alive:
                break
            time.sleep(EVERY)
    left = sum(row["state"] in ("waiting", "running") for row in rows)
    if left:
        command = visible(str(status.about.get("command", "the same command")))
        say(f"No sweep works on {folder} now, and {left} of its runs are not finished. To go on: {command}")
    return 1 if left or any(row["state"] == "failed" for row in rows) else 0
