"""Reading a file of JSON lines while another process writes it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class Lines:
    """The lines of a file that grows or is replaced, each given once."""

    def __init__(self, file: Path) -> None:
        self.file, self._inode, self._read = file, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """The whole lines that have come in since the last call; all of them again when the file was replaced, none while there is no file."""
        try:
            with self.file.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self._inode or about.st_size < self._read:
                    self._inode, self._read = about.st_ino, 0
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
        except OSError:
            return []
        self._read += len(whole) + 1 if whole else 0
        found = []
        for line in whole.splitlines():
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]
