"""Train one run and return the exit code of the process.

The command ``finetune train`` and every child of a sweep train this way. A fresh child of a sweep is
``python -m finetune.launch.child PARENT OPTIONS CONFIG``, where CONFIG is a frozen configuration.

Modules that take time to import are imported inside the functions, after ``Signals`` has taken over: a signal
that arrives during the imports must stop the run like any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system.environment import rank
from ..system.exit_code import INTERRUPTED, print_line
from ..system.signals import Interrupted, Signals
from .start import StartOptions, child_main

if TYPE_CHECKING:
    from ..config.settings import Config

Read = Callable[[], "tuple[Config, Path]"]
Report = Callable[[dict[str, Any], Path], None]


def train_frozen(config: str, options: StartOptions) -> int:
    """Train the frozen configuration in the file ``config``; return 0, or 130 after a signal.

    Prints no result. Raises what ``train`` raises; ``run_child`` turns that into a message and an exit code.
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
    """Train the configuration in the folder that ``read`` returns; return 0, or 130 after a signal.

    ``processes`` is the number of ranks, by default as many as trained this run before. ``report`` is called
    in rank 0 with the result and the folder. ``preview``, if given, is called with the configuration, and
    nothing is trained. Raises ``FinetuneError`` for a mistake of the user or a failed run.
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

            print_line(f"Stopped by {stop.name}{stop.saved}. To continue: {command(folder, processes or 1)}")
        return INTERRUPTED


def _processes_before(folder: Path) -> int:
    """Return how many ranks trained this run before; 1 if none did, or if a launcher started this process."""
    if "LOCAL_RANK" in os.environ:
        return 1
    from .resume import processes

    before = processes(folder) or 1
    if before > 1:
        print_line(f"Continuing with {before} processes, as before (--processes sets another number).")
    return before


def _result(
    config: Config, folder: Path, signals: Signals, processes: int, options: StartOptions
) -> dict[str, Any]:
    """Train, unless ``folder`` already holds the finished result of ``config``, and return the result."""
    from ..storage.run_folder import RunFolder
    from .ranks import launch, train_rank

    files = RunFolder(folder)
    if files.finished:
        files.open_or_check(config)
        print_line(f"{folder} already holds the finished result of this run, so nothing was trained.")
        return files.read_result()
    if processes > 1:
        return launch(config, folder, processes, options)
    return train_rank(config, folder, signals)


if __name__ == "__main__":
    child_main(train_frozen)
