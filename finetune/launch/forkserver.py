"""Runs forked from one process that has imported everything: seconds less a run than a new interpreter. Linux only; not with GPUs.

The server is Python's own (``multiprocessing``'s forkserver). It computes nothing, so that nothing of it can get into a run, and ends with the sweep;
its children end with it. A GPU's driver does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing import reduction
from multiprocessing.context import ForkServerContext
from typing import Any

from ..storage.lock import INHERITED
from .start import StartOptions, end_with, run_child

LOADS = "finetune.launch.preload"  # what the server imports
LOADED_BY = (
    os.getpid()
)  # in a child, the server, which has loaded this module, too: it may have ended before the child can look


class _Inherited:
    """An open file that is handed to the child; there its number is ``fd``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.fd),)


def _received(passed: Any) -> _Inherited:
    return _Inherited(passed.detach())


class Forked:
    """As much of ``subprocess.Popen`` as a sweep uses: a process that trains the frozen configuration in the file ``config``."""

    def __init__(self, config: str, options: StartOptions, environment: dict[str, str], held: int) -> None:
        read, write = os.pipe()
        self.stderr = os.fdopen(read, "rb", buffering=0)
        try:
            self._process = context(environment).Process(
                target=_enter, args=(config, options, environment, _Inherited(write), _Inherited(held))
            )
            self._process.start()
        except BaseException:
            self.stderr.close()
            raise
        finally:
            os.close(write)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of ``subprocess``: minus the signal that ended it; ``None`` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same, as a method."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To it alone."""
        if self.returncode is None:
            os.kill(self.pid, number)


def context(environment: dict[str, str]) -> ForkServerContext:
    """The server, started at first use. How threads wait is read when a library is loaded, so it must be in the server's own environment."""
    for name, value in environment.items():
        if name.startswith("OMP_"):
            os.environ[name] = value
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.bound", __name__, LOADS])
    return context


def _enter(
    config: str, options: StartOptions, environment: dict[str, str], errors: _Inherited, held: _Inherited
) -> None:
    """The child: set up as a process of its own, then trained."""
    os.setpgid(0, 0)
    end_with(LOADED_BY)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for source, target in ((nowhere, 0), (nowhere, 1), (errors.fd, 2)):
        os.dup2(source, target)
    os.close(errors.fd)
    os.environ.clear()
    os.environ.update(environment, **{INHERITED: str(held.fd)})
    import torch

    if environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    from .child import train_frozen

    sys.exit(run_child(train_frozen, options, config))
