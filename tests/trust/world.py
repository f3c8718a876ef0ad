"""What the tests of hostile folders have in common."""

from __future__ import annotations

from pathlib import Path

from ..support.command import Hang as Hang
from ..support.command import Said as Said
from ..support.command import call as call

RUN = Path("outputs/first/run")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below, links not followed."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path)] = (about.st_size, about.st_mtime_ns)
    return found
