"""Start child processes: the command that starts one, and what each child does first. Imports no torch.

A fresh child is a module that runs as ``python -m MODULE PARENT OPTIONS WORD...``. Its ``__main__`` block
calls ``child_main``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

from ..system.exit_code import exit_code_of

PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class StartOptions:
    """Options of the command line that must hold in every process that it starts.

    These processes are ranks, runs of a sweep, measurements and cluster jobs. Each receives the options, as
    JSON or pickled, and calls ``apply`` before it reads a configuration. All fields are plain JSON values.

    ``plugins``: absolute folders of plug-ins. Every process finds installed plug-ins by itself.
    """

    plugins: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Write the options as one word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StartOptions:
        """Read what ``to_json`` wrote."""
        stated = json.loads(text)
        return cls(tuple(stated["plugins"]))

    def apply(self) -> None:
        """Make the options hold in this process: load the plug-ins that are not loaded yet.

        Raises ``ConfigError`` if one cannot be loaded.
        """
        from ..config import plugins

        plugins.load(self.plugins)


NO_OPTIONS = StartOptions()


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the process ``parent`` ends; exit now if that has already ended.

    Only the kernel of Linux can do this; on other systems the process outlives its parent.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("The process that started this one has ended.")


def child_command(module: str, options: StartOptions, *words: str) -> list[str]:
    """Return the command that runs ``module`` as a child of this process."""
    return [sys.executable, "-m", module, str(os.getpid()), options.to_json(), *words]


def child_main(main: Callable[..., int]) -> NoReturn:
    """Do what the ``__main__`` block of a fresh child does: bind to the parent, run ``main``, and exit."""
    parent, options, *words = sys.argv[1:]
    end_with(int(parent))
    sys.exit(run_child(main, StartOptions.from_json(options), *words))


def run_child(main: Callable[..., int], options: StartOptions, *words: str) -> int:
    """Apply ``options``, call ``main(*words, options)``, and return its exit code, or that of an error."""

    def action() -> int:
        options.apply()
        return main(*words, options)

    return exit_code_of(action)
