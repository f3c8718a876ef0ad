"""Tell the user what a run does, and keep it in the run's ``log.txt``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..errors import make_printable

Say = Callable[[str], None]


class RunLog:
    """Pass lines to ``say`` and append them to ``file``. Without a file (ranks other than 0), do neither."""

    def __init__(self, file: Path | None, say: Say) -> None:
        self.file, self.say = file, say

    def __call__(self, line: str) -> None:
        if self.file:
            self.write(line)
            self.say(line)

    def write(self, line: str) -> None:
        """Append a line with the local time to the file, without telling the user."""
        if self.file:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {make_printable(line)}\n")
