"""The real ``main``, called in this process and watched."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS = 10.0  # of this process: what others do to the machine does not count
REAL_SECONDS = 300.0  # of one that waits for something that never comes
RUN = Path("outputs/first/run")


@dataclass
class Said:
    code: int
    out: str
    err: str


class Hang(BaseException):
    """A command used more than ``CPU_SECONDS``."""


def _hang(*_: Any) -> None:
    raise Hang


def call(*words: object, folder: Path) -> Said:
    """``finetune WORDS`` in ``folder``, in this process. Raises ``Hang``."""
    from finetune.cli import app as cli

    out, err, argv, before = io.StringIO(), io.StringIO(), sys.argv, Path.cwd()
    code, handlers = (
        0,
        [(number, signal.signal(number, _hang)) for number in (signal.SIGPROF, signal.SIGALRM)],
    )
    os.chdir(folder)
    sys.argv = ["finetune", *map(str, words)]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, REAL_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers:
            signal.signal(number, handler)
        sys.argv = argv
        os.chdir(before)
    return Said(code, out.getvalue(), err.getvalue())


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below, links not followed."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path)] = (about.st_size, about.st_mtime_ns)
    return found
