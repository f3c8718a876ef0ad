"""Fork runs from one process that has imported everything, which saves seconds in every run.

This works on Linux only, and not with GPUs, whose drivers do not survive a fork.

The fork server is that of Python's ``multiprocessing``. It computes nothing, so it cannot influence a run. It
ends with the sweep, and its children end with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, reduction, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any

from ..storage.lock import INHERITED
from .start import StartOptions, end_with, run_child

PRELOAD = f"{__package__}.preload"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The fork server imports this module, so in a forked child this is the server's process id, even after the
# server has ended.
SERVER = os.getpid()


class _InheritedFile:
    """An open file that is handed to the child, where its descriptor is ``fd``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_file, (reduction.DupFd(self.fd),)


def _receive_file(passed: Any) -> _InheritedFile:
    return _InheritedFile(passed.detach())


class Forked:
    """A forked process that trains the frozen configuration in the file ``config``.

    It has as much of the interface of ``subprocess.Popen`` as a sweep uses. ``lock`` is the descriptor of the
    run's lock, which the child holds too; ``environment`` replaces the child's environment variables.
    """

    def __init__(self, config: str, options: StartOptions, environment: dict[str, str], lock: int) -> None:
        read, write = os.pipe()
        self.stderr = os.fdopen(read, "rb", buffering=0)
        arguments = (config, options, environment, _InheritedFile(write), _InheritedFile(lock))
        try:
            self._process = server_context(environment).Process(target=_run_forked, args=arguments)
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
        """The exit code, or minus the signal that ended the process; ``None`` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return ``returncode``."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, but not to its children."""
        if self.returncode is None:
            os.kill(self.pid, number)


def server_context(environment: dict[str, str]) -> ForkServerContext:
    """Return the context of the fork server, which starts at its first use.

    OpenMP reads its settings (such as how threads wait) when a library is loaded, so ``OMP_*`` must be in the
    server's own environment.
    """
    for name, value in environment.items():
        if name.startswith("OMP_"):
            os.environ[name] = value
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    # The server inherits the blocked signals and keeps them blocked until ``preload`` ignores them; otherwise
    # an early Ctrl-C would kill it. The tracker must start first, since its start unblocks signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _run_forked(
    config: str,
    options: StartOptions,
    environment: dict[str, str],
    errors: _InheritedFile,
    lock: _InheritedFile,
) -> None:
    """Set the child up like a new process, then train. ``errors`` becomes its standard error."""
    os.setpgid(0, 0)
    end_with(SERVER)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(errors.fd, 2)
    os.close(errors.fd)
    os.environ.clear()
    os.environ.update(environment, **{INHERITED: str(lock.fd)})
    import torch

    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    from .child import train_frozen

    sys.exit(run_child(train_frozen, options, config))
