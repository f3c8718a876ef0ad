"""Hydra's multirun, as a process of its own: ``python -m finetune.sweep.jobs PARENT FILE``, where FILE says what to run (see ``launch``)."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString

from ..launch.child import end_with
from .launch import job


def multirun(told: dict[str, Any]) -> None:
    """One Hydra job for each of ``files``. ``hydra.main`` would read the command line and change folders; this is what it calls."""
    version.setbase("1.3")
    ConfigStore.instance().store(
        name="finetune_job", node={"file": None, **{key: told[key] for key in ("threads", "gpus", "home")}}
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


def _written(value: Any) -> str:
    """A value of JSON in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_written(item) for item in value) + "]"
    return QuotedString(value, Quote.double).with_quotes() if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    logging.getLogger("submitit").setLevel(logging.ERROR)
    multirun(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
