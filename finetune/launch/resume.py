"""``finetune train --resume RUN``: which run that is, and how it is told to the user. Imports no torch."""

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

MOST = 64  # processes of one machine
PLACE = ("name", "run")  # settings that say where a run lies, which --resume does already


def frozen(run: Path, overrides: list[str]) -> Config:
    """The configuration of the run in ``run`` with ``overrides`` on top. Raises ``ConfigError`` naming those that could change its result."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"--resume {run}: no config.yaml of a run is there. Give the folder of a run, outputs/NAME/RUN."
        )
    may = ", ".join(f"{key}.*" if key == "logger" else key for key in NOT_THE_RUN if key not in PLACE)
    keys = {text: text.partition("=")[0] for text in overrides}
    wrong = [text for text, key in keys.items() if decides(key) or key in (*PLACE, "logger")]
    if wrong:
        raise ConfigError(
            *(
                f"{text}: --resume goes on with a run as it was started, and takes only {may}. Start another run for anything else."
                for text in wrong
            )
        )
    return load(overrides, None, file)


def processes(run: Path) -> int | None:
    """How many processes made the newest checkpoint in ``run``; ``None`` where none says so, or more than one machine has."""
    files = RunFolder(run)
    for step in reversed(files.steps()):
        with suppress(OSError, ValueError):
            count: int = safe.read_json(files.checkpoint(step) / "state.json", {"extra": {"processes": int}})[
                "extra"
            ]["processes"]
            return count if 0 < count <= MOST else None
    return None


def command(folder: Path | None, processes: int = 1) -> str:
    """What goes on with the run in ``folder``, by as many processes: before its configuration is frozen there, or without one, what was typed."""
    if folder and (folder / "config.yaml").is_file():
        several = f" --processes {processes}" if processes > 1 else ""
        return f"finetune train --resume {shlex.quote(str(folder))}{several}{plugins.words()}"
    return f"finetune {shlex.join(sys.argv[1:])}"
