"""Hydra's multirun, as a process of its own: ``python -m finetune.sweep.jobs PARENT OPTIONS FILE``, where FILE says what to run (see ``launch``)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString

from ..launch.start import StartOptions, child_main
from .launch import job


def multirun(file: str, options: StartOptions) -> int:
    """One Hydra job for each of ``files``. ``hydra.main`` would read the command line and change folders; this is what it calls."""
    logging.getLogger("submitit").setLevel(logging.ERROR)
    told = json.loads(Path(file).read_text(encoding="utf-8"))
    version.setbase("1.3")
    ConfigStore.instance().store(
        name="finetune_job",
        node={"file": None, **{key: told[key] for key in ("threads", "gpus", "home", "options")}},
    )
    quiet = [
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
    ]
    place = [
        f"hydra.sweep.dir={_written(told['home'])}",
        "hydra.sweep.subdir=${hydra.job.num}",
        f"hydra/launcher={told['launcher']}",
    ]
    changes = [
        f"++hydra.launcher.{key}={_written(value)}"
        for key, value in told["settings"].items()
        if value is not None
    ]
    hydra = Hydra.create_main_hydra2("finetune", create_config_search_path(None))
    files = ",".join(_written(file) for file in told["files"])
    hydra.multirun(
        "finetune_job", job, [f"file={files}", *place, *quiet, *changes], with_log_configuration=False
    )
    return 0


def _written(value: Any) -> str:
    """A value of JSON in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_written(item) for item in value) + "]"
    return QuotedString(value, Quote.double).with_quotes() if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    child_main(multirun)
