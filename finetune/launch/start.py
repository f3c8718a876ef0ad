"""How child processes are started: the command that starts one, and what each child does first. Imports no torch.

A child is a module run by ``python -m MODULE PARENT OPTIONS WORD...``; its ``__main__`` block calls ``child_main``.
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
    """Options of the command line that must hold in every process it starts: ranks, runs of a sweep, measurements, cluster jobs.

    Every child receives them, as JSON or pickled, and calls ``apply`` before it reads any configuration. All fields are plain JSON values.

    ``plugins``: absolute folders of plug-ins. Installed plug-ins are found by every process itself.
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
    """Have the kernel kill this process when the process ``parent`` ends; exit now if it has already ended. Only Linux can."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("The process that started this one has ended.")


def child_command(module: str, options: StartOptions, *words: str) -> list[str]:
    """Return the command that runs ``module`` as a child of this process."""
    return [sys.executable, "-m", module, str(os.getpid()), options.to_json(), *words]


def child_main(main: Callable[..., int]) -> NoReturn:
    """The ``__main__`` block of a module that ``child_command`` starts: bind to the parent, then run ``main`` and exit."""
    parent, options, *words = sys.argv[1:]
    end_with(int(parent))
    sys.exit(run_child(main, StartOptions.from_json(options), *words))


def run_child(main: Callable[..., int], options: StartOptions, *words: str) -> int:
    """Apply ``options``, call ``main`` with ``words`` and ``options``, and return the exit code, that of an error included."""

    def action() -> int:
        options.apply()
        return main(*words, options)

    return exit_code_of(action)
