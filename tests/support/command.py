"""Call the real ``main`` of the command line in this process, and read what it wrote."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS = 10.0  # of this process alone
REAL_SECONDS = 300.0  # for a command that waits for something that never comes


@dataclass
class Said:
    """The exit code of a command and what it wrote to standard output and standard error."""

    code: int
    out: str
    err: str


class Hang(BaseException):
    """A command used more than ``CPU_SECONDS`` or ``REAL_SECONDS``."""


def _hang(*_: Any) -> None:
    raise Hang


def call(*words: object, folder: Path) -> Said:
    """Run ``finetune WORDS`` in ``folder``, in this process. Raises ``Hang``."""
    from finetune.cli import app as cli

    out, err, argv, before, code = io.StringIO(), io.StringIO(), sys.argv, Path.cwd(), 0
    handlers = [(number, signal.signal(number, _hang)) for number in (signal.SIGPROF, signal.SIGALRM)]
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
