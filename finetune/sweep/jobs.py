"""Run Hydra's multirun in a process of its own: ``python -m finetune.sweep.jobs PARENT OPTIONS FILE``.

FILE is the JSON that ``cluster`` writes; it says what to run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString

from ..launch.start import StartOptions, child_main
from .cluster import job

NAME = "finetune_job"  # the name of a job's configuration in Hydra's store


def multirun(file: str, options: StartOptions) -> int:
    """Run one Hydra job for each of the configurations that ``file`` lists; return 0.

    ``hydra.main`` would read the command line and change folders, so the functions inside it are called here.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)
    order = json.loads(Path(file).read_text(encoding="utf-8"))
    node = {"file": None}
    for key in ("threads", "gpus", "home", "options"):
        node[key] = order[key]
    ConfigStore.instance().store(name=NAME, node=node)
    overrides = [
        "file=" + ",".join(_to_grammar(config) for config in order["files"]),
        f"hydra.sweep.dir={_to_grammar(order['home'])}",
        "hydra.sweep.subdir=${hydra.job.num}",
        f"hydra/launcher={order['launcher']}",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
    ]
    for key, value in order["settings"].items():
        if value is not None:
            overrides.append(f"++hydra.launcher.{key}={_to_grammar(value)}")
    initialize(config_path=None, job_name="finetune", version_base="1.3")
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    hydra.multirun(NAME, job, overrides, with_log_configuration=False)
    return 0


def _to_grammar(value: Any) -> str:
    """Write a JSON value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        items = [f"{key}:{_to_grammar(item)}" for key, item in value.items()]
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_to_grammar(item) for item in value) + "]"
    if isinstance(value, str):
        return QuotedString(value, Quote.double).with_quotes()
    return json.dumps(value)


if __name__ == "__main__":
    child_main(multirun)
