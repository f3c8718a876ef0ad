"""Read a file of JSON lines while another process writes it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..storage.run_folder import RunFolder

TAIL_BYTES = 65536


class Lines:
    """Read the lines of a file that grows or is replaced; return each line once."""

    def __init__(self, file: Path) -> None:
        self.file, self._inode, self._read = file, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """Return the complete lines that were written since the last call; none while there is no file.

        After the file was replaced by another one, all of its lines are new.
        """
        try:
            with self.file.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._read:
                    self._inode, self._read = status.st_ino, 0
                file.seek(self._read)
                complete, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._read += len(complete) + len(newline)
        return _parse(complete.splitlines())


def read_last_lines(file: Path) -> list[dict[str, Any]]:
    """Return the last lines of a file of JSON objects; none if there is no file. A torn line is left out."""
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - TAIL_BYTES))
            return _parse(handle.read().splitlines())
    except OSError:
        return []


def last_step(folder: RunFolder) -> int:
    """Return the last step in the run's ``metrics.jsonl``, 0 if there is none."""
    for line in reversed(read_last_lines(folder.metrics)):
        if isinstance(line.get("step"), int):
            return int(line["step"])
    return 0


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    """Return the lines that are JSON objects."""
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
