"""``finetune train --resume RUN``: read the run to resume, and name the command for it. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from pathlib import Path

from ..config import plugins
from ..config.load import load
from ..config.settings import NOT_THE_RUN, Config, decides
from ..errors import ConfigError
from ..storage.run_folder import RunFolder
from ..system import safe

MOST = 64  # ranks of one machine
PLACE = ("name", "run")  # settings that say where a run lies; --resume says that itself


def frozen(run: Path, overrides: list[str]) -> Config:
    """Return the frozen configuration of the run in ``run`` with ``overrides`` on top.

    Raises ``ConfigError`` naming each override that could change the run's result.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"--resume {run}: no config.yaml of a run is there. Give the folder of a run, outputs/NAME/RUN."
        )
    wrong = []
    for text in overrides:
        key = text.partition("=")[0]
        if decides(key) or key in (*PLACE, "logger"):
            wrong.append(text)
    if wrong:
        allowed = ", ".join("logger.*" if key == "logger" else key for key in NOT_THE_RUN if key not in PLACE)
        rule = f"--resume continues a run as it was started, and takes only {allowed}."
        raise ConfigError(*[f"{text}: {rule} Start another run for anything else." for text in wrong])
    return load(overrides, None, file)


def processes(run: Path) -> int | None:
    """Return how many ranks wrote the newest readable checkpoint in ``run``.

    ``None`` if there is no checkpoint, or if more ranks wrote it than one machine can run.
    """
    files = RunFolder(run)
    for step in reversed(files.steps()):
        with suppress(OSError, ValueError):
            state = safe.read_json(files.checkpoint(step) / "state.json", {"extra": {"processes": int}})
            count: int = state["extra"]["processes"]
            return count if 0 < count <= MOST else None
    return None


def command(folder: Path | None, processes: int = 1) -> str:
    """Return the command that resumes the run in ``folder``, with ``processes`` ranks.

    Without a folder, or before a configuration is frozen in it, this is the command that was typed.
    """
    if folder is None or not (folder / "config.yaml").is_file():
        return f"finetune {shlex.join(sys.argv[1:])}"
    ranks = f" --processes {processes}" if processes > 1 else ""
    return f"finetune train --resume {shlex.quote(str(folder))}{ranks}{plugins.words()}"
