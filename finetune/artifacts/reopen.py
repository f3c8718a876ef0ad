"""Rebuild runs that have stored their change, and evaluate them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.load import load as load_config
from ..core.zeros import fingerprint_zeros
from ..errors import ConfigError
from ..storage import checkpoint
from ..storage.delta import load_delta, read_description
from ..storage.frozen_config import MOVABLE
from ..storage.progress import read_progress
from ..storage.run_folder import RunFolder
from ..system import safe
from ..training.prepare import Setup, prepare


def run_of(path: Path) -> tuple[RunFolder, Path | None]:
    """Return the run that ``path`` names, and the folder of the checkpoint if it names one.

    ``path``: a run, its ``delta``, or a ``checkpoints/step-N``.
    """
    for root, state in ((path, None), (path.parent, None), (path.parent.parent, path)):
        if (root / "config.yaml").is_file() and path.is_dir():
            safe.check_links(root)
            return RunFolder(root), state if state and (state / "state.json").is_file() else None
    raise ConfigError(
        f"ckpt={path} is not the folder of a run (it has no config.yaml). "
        "Give outputs/<name>/<run>, as `finetune train` prints it."
    )


def place_of(wanted: Path, runs: Sequence[Path]) -> int:
    """Return the position of a run among ``runs``, or -1."""
    for i, run in enumerate(runs):
        if run.resolve() == wanted.resolve():
            return i
    return -1


def rebuild(path: Path, dataset: Any = None) -> Setup:
    """Rebuild a run from its base and its stored change, with the run's data or with ``dataset``.

    Raises ``ConfigError`` if they do not fit each other.
    """
    files, state = run_of(path)
    config = load_config([], None, files.config)
    if dataset:
        config = replace(config, dataset=dataset)
    about = read_description(files.delta)
    files.check_unaltered(about["config"], files.delta, MOVABLE)
    setup = prepare(config, trains=False)
    if dataset:
        _check_labels(list(setup.labels), about["labels"], dataset.name, files.path)
    if setup.fingerprint != about["base_fingerprint"]:
        if config.model.init == "random":
            raise ConfigError(
                f"model.init=random draws other weights here than those that {files.path} was trained on. "
                "Use the versions of torch and transformers that its result.json names."
            )
        raise ConfigError(
            f"model.path={config.model.path} is not the model that {files.path} was trained on: its weights "
            "differ. Restore the original base."
        )
    if fingerprint_zeros(setup.session.model) != about.get("zeros"):
        raise ConfigError(
            f"model.path={config.model.path} does not hold the same entries at 0 as when {files.path} was "
            "trained: its finetune/masks.safetensors differs. Restore the original base."
        )
    if state:
        record = read_progress(state, checkpoint.load(state, setup.session))
        files.check_unaltered(record.config or about["config"], state, MOVABLE)
        return setup
    phase, phases = about.get("phase", 0), len(setup.session.phases)
    if not 0 <= phase < phases:
        raise ConfigError(
            f"{files.delta} is of phase {phase}, but method={config.method.name} has {phases}, from 0. "
            "Train it again."
        )
    setup.session.enter(phase)
    load_delta(files.delta, setup.session.states)
    return setup


def _check_labels(found: list[str], trained: list[str], dataset: str, run: Path) -> None:
    """Raise ``ConfigError`` unless a data set has the labels that a run was trained with."""
    if len(found) != len(trained):
        raise ConfigError(
            f"dataset={dataset} has {len(found)} labels and the head of {run} has {len(trained)}. "
            "Evaluate on a data set with the same labels."
        )
    if found != trained:
        raise ConfigError(
            f"dataset={dataset} has the labels {found[:5]} and the head of {run} has {trained[:5]}; "
            "they must agree."
        )


def evaluate(path: Path, dataset: Any = None) -> dict[str, Any]:
    """Compute the metrics of a run's stored change on test, validation and retention data, if it has them."""
    setup = rebuild(path, dataset)
    metrics = {}
    for split in ("val", "test", "retention"):
        if split in setup.splits:
            metrics[split] = setup.evaluate(split).metrics
    return {"run": str(path), "dataset": setup.config.dataset.name, "metrics": metrics}
