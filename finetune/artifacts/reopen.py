"""Runs that have stored their change: put together again, and evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.load import load as load_config
from ..errors import ConfigError
from ..storage import checkpoint
from ..storage.delta import load_delta, read_description
from ..storage.frozen_config import MOVABLE
from ..storage.progress import read_progress
from ..storage.run_folder import RunFolder
from ..system import safe
from ..training.prepare import Setup, prepare


def run_of(path: Path) -> tuple[RunFolder, Path | None]:
    """The run that ``path`` names, and the checkpoint folder if it names one. ``path``: a run, its ``delta``, or a ``checkpoints/step-N``."""
    for root, state in ((path, None), (path.parent, None), (path.parent.parent, path)):
        if (root / "config.yaml").is_file() and path.is_dir():
            safe.check_links(root)
            return RunFolder(root), state if state and (state / "state.json").is_file() else None
    raise ConfigError(
        f"ckpt={path} is not the folder of a run (it has no config.yaml). Give outputs/<name>/<run>, as `finetune train` prints it."
    )


def rebuild(path: Path, dataset: Any = None) -> Setup:
    """Base plus stored change of a run, with the run's data or with ``dataset``. Raises ``ConfigError`` where they do not fit each other."""
    files, state = run_of(path)
    config = load_config([], None, files.config)
    config = replace(config, dataset=dataset) if dataset else config
    known = read_description(files.delta)
    files.check_unaltered(known["config"], files.delta, MOVABLE)
    setup = prepare(config)
    if dataset and len(setup.labels) != len(known["labels"]):
        raise ConfigError(
            f"dataset={dataset.name} has {len(setup.labels)} labels and the head of {files.path} has {len(known['labels'])}. "
            "Evaluate on a data set with the same labels."
        )
    if dataset and list(setup.labels) != known["labels"]:
        raise ConfigError(
            f"dataset={dataset.name} has the labels {list(setup.labels)[:5]} and the head of {files.path} has {known['labels'][:5]}; they must agree."
        )
    if setup.fingerprint != known["base_fingerprint"]:
        raise ConfigError(
            f"model.path={config.model.path} is not the model that {files.path} was trained on: its weights differ. Restore the original base."
        )
    if state:
        record = read_progress(state, checkpoint.load(state, setup.session))
        files.check_unaltered(record.config or known["config"], state, MOVABLE)
    else:
        if not 0 <= (phase := known.get("phase", 0)) < len(setup.session.phases):
            raise ConfigError(
                f"{files.delta} is of phase {phase}, and method={config.method.name} has {len(setup.session.phases)}. Train it again."
            )
        setup.session.enter(phase)
        load_delta(files.delta, setup.session.states)
    return setup


def evaluate(path: Path, dataset: Any = None) -> dict[str, Any]:
    """The metrics of a run's stored change on the test split (and validation and retention, where there are), computed anew."""
    setup = rebuild(path, dataset)
    found = {
        split: setup.evaluate(split).metrics
        for split in ("val", "test", "retention")
        if split in setup.splits
    }
    return {"run": str(path), "dataset": setup.config.dataset.name, "metrics": found}
