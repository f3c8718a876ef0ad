"""Real runs of the command line that start in a moment and can be killed at any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Imports what the commands import, then forks a process for each command, in a group of its own, as a
# shell does: the real main().
CODE = """
import gc, json, os, signal, sys
import finetune.cli.app, finetune.config.load, finetune.training.run, finetune.data.table, \
finetune.methods.sparse.sparse, finetune.sweep
import datasets, transformers
from transformers import ViTForImageClassification, ViTImageProcessor
gc.freeze()  # a session ends with a collection of all there is
for line in sys.stdin:
    words, folder, out, err = json.loads(line)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(folder)
        for number, path in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["finetune", *words]
        code = 0
        try:
            finetune.cli.app.main()
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Child:
    """A command that runs. ``wait`` gives its exit code: that of the signal, negative, if one ended it."""

    pid: int
    folder: Path
    nursery: Any
    logs: Path
    code: int | None = None

    def wait(self) -> int:
        if self.code is None:
            self.code = int(self.nursery.stdout.readline())
        return self.code

    def kill(self, number: int, group: bool = False) -> None:
        """Send a signal to it, or to it and all that it started; nothing if it has ended."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it still runs; a process that has ended is a zombie until it is waited for."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def until(self, seen: Callable[[], bool]) -> bool:
        """Wait until ``seen``, looking a thousand times per second; whether it still ran then."""
        looks = 0
        while looks % 16 or self.alive:  # which costs more than most looks
            if seen():
                return True
            looks += 1
            time.sleep(0.001)
        return False

    @property
    def said(self) -> str:
        """What it wrote to standard error."""
        return (self.logs / "err").read_text()

    @property
    def out(self) -> str:
        """What it wrote to standard output."""
        return (self.logs / "out").read_text()


@dataclass
class Nursery:
    """Starts commands, one at a time."""

    process: Any
    logs: Path

    def start(self, *words: str, folder: Path) -> Child:
        """``finetune`` with these words, in ``folder``."""
        order = [list(words), str(folder), str(self.logs / "out"), str(self.logs / "err")]
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Child(int(self.process.stdout.readline()), folder, self.process, self.logs)

    def run(self, *words: str, folder: Path) -> Child:
        """The same, to its end."""
        child = self.start(*words, folder=folder)
        child.wait()
        return child


@contextmanager
def nursery(logs: Path) -> Iterator[Nursery]:
    """Inside, there is one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "WANDB_MODE": "offline",
    }
    with subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield Nursery(process, logs)
        assert process.stdin
        process.stdin.close()
