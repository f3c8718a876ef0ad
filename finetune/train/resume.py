"""``finetune train --resume RUN``: which run that is, and how it is told to the user. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from ..config import load
from ..errors import ConfigError
from ..settings import NOT_THE_RUN, Config, decides

PLACE = ("name", "run")  # settings that say where a run lies, which --resume does already


def frozen(run: Path, overrides: list[str]) -> Config:
    """The configuration of the run in ``run`` with ``overrides`` on top. Raises ``ConfigError`` naming those that could change its result."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--resume {run}: no config.yaml of a run is there. Give the folder of a run, outputs/NAME/RUN.")
    may = ", ".join(f"{key}.*" if key == "logger" else key for key in NOT_THE_RUN if key not in PLACE)
    keys = {text: text.partition("=")[0] for text in overrides}
    wrong = [text for text, key in keys.items() if decides(key) or key in (*PLACE, "logger")]
    if wrong:
        raise ConfigError(
            *(f"{text}: --resume goes on with a run as it was started, and takes only {may}. Start another run for anything else." for text in wrong)
        )
    return load(overrides, None, file)


def command(folder: Path | None, processes: int = 1) -> str:
    """What goes on with the run in ``folder``, by as many processes: before its configuration is frozen there, or without one, what was typed."""
    if folder and (folder / "config.yaml").is_file():
        return f"finetune train --resume {shlex.quote(str(folder))}" + (f" --processes {processes}" if processes > 1 else "")
    return f"finetune {shlex.join(sys.argv[1:])}"
