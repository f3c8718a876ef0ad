"""Train one run and return the exit code of the process. The command ``finetune train`` and every child of a sweep train this way.

``python -m finetune.launch.child PARENT OPTIONS CONFIG`` trains one frozen configuration in a new process (see ``start``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system.environment import rank
from ..system.exit_code import print_line
from ..system.signals import CODE, Interrupted, Signals
from .start import StartOptions, child_main

if TYPE_CHECKING:
    from ..config.settings import Config

# Whatever takes time to import is imported inside the functions: a signal that comes meanwhile must stop the run as any other does.
Read = Callable[[], "tuple[Config, Path]"]
Report = Callable[[dict[str, Any], Path], None]


def train_frozen(config: str, options: StartOptions) -> int:
    """Train the frozen configuration in the file ``config``; return the exit code as ``train`` does. Prints no result.

    ``run_child`` calls it and turns what it raises into messages and exit codes.
    """

    def read() -> tuple[Config, Path]:
        from ..config.load import load
        from ..storage.run_folder import run_folder

        frozen = load([], None, Path(config))
        return frozen, run_folder(frozen)

    return train(read, options)


def train(
    read: Read,
    options: StartOptions,
    processes: int | None = None,
    report: Report = lambda result, folder: None,
    preview: Callable[[Config], None] | None = None,
) -> int:
    """Train the configuration and folder that ``read`` returns; return 0, or 130 after a signal, and raise any other failure.

    ``processes``: how many ranks train together; by default as many as trained the run before. ``report`` is called with the result in rank 0.
    ``preview`` is called with the configuration instead of training.
    """
    folder: Path | None = None
    try:
        with Signals() as signals:
            config, folder = read()
            if preview is not None:
                preview(config)
                return 0
            processes = processes or _processes_before(folder)
            result = _result(config, folder, signals, processes, options)
            if rank() == 0:
                report(result, folder)
            return 0
    except Interrupted as stop:
        with suppress(OSError):  # after SIGHUP the terminal may be gone
            from .resume import command

            print_line(f"Stopped by {stop.name}{stop.saved}. To go on: {command(folder, processes or 1)}")
        return CODE


def _processes_before(folder: Path) -> int:
    """Return how many ranks trained the run in ``folder`` before; 1 for a new run, and in a rank that a launcher has started."""
    if "LOCAL_RANK" in os.environ:
        return 1
    from . import resume

    before = resume.processes(folder) or 1
    if before > 1:
        print_line(f"Going on with {before} processes, as before (--processes takes another number).")
    return before


def _result(
    config: Config, folder: Path, signals: Signals, processes: int, options: StartOptions
) -> dict[str, Any]:
    """Train, unless ``folder`` holds the finished result of this configuration already, and return the result."""
    from ..storage.run_folder import RunFolder
    from .ranks import launch, work

    files = RunFolder(folder)
    if files.finished:
        files.open_or_check(config)
        print_line(f"{folder} holds the finished result of this very run, so nothing was run again.")
        return files.read_result()
    if processes > 1:
        return launch(config, folder, processes, options)
    return work(config, folder, signals)


if __name__ == "__main__":
    child_main(train_frozen)
