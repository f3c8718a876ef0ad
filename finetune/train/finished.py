"""What is done with runs that have stored their change: evaluate it again, merge it into its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import load as load_config
from ..core.part import merge as merge_parts
from ..data.encode import collate
from ..errors import ConfigError
from ..models.load import save
from . import checkpoint, stored
from .files import RunFolder, replacing
from .setup import Setup, prepare

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.02}  # of logits, by the dtype that the merged weights are rounded to


def run_of(path: Path) -> tuple[RunFolder, Path | None]:
    """The run that ``path`` names, and the checkpoint folder if it names one. ``path``: a run, its ``delta``, or a ``checkpoints/step-N``."""
    for root, state in ((path, None), (path.parent, None), (path.parent.parent, path)):
        if (root / "config.yaml").is_file() and path.is_dir():
            return RunFolder(root), state if state and (state / "state.json").is_file() else None
    raise ConfigError(f"ckpt={path} is not the folder of a run (it has no config.yaml). Give outputs/<name>/<run>, as `finetune train` prints it.")


def rebuild(path: Path, dataset: Any = None) -> Setup:
    """Base plus stored change of a run, with the run's data or with ``dataset``. Raises ``ConfigError`` where they do not fit each other."""
    files, state = run_of(path)
    config = load_config([], None, files.config)
    config = replace(config, dataset=dataset) if dataset else config
    known = stored.about(files.delta)
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
        checkpoint.load(state, setup.session)
    else:
        setup.session.enter(known.get("phase", 0))
        stored.load(files.delta, setup.session.states)
    return setup


def evaluate(path: Path, dataset: Any = None) -> dict[str, Any]:
    """The metrics of a run's stored change on the test split (and validation and retention, where there are), computed anew."""
    setup = rebuild(path, dataset)
    found = {split: setup.evaluate(split).metrics for split in ("val", "test", "retention") if split in setup.splits}
    return {"run": str(path), "dataset": setup.config.dataset.name, "metrics": found}


@torch.no_grad()
def merge(path: Path, out: Path, tolerance: float | None = None) -> dict[str, Any]:
    """Write base and change as one Hugging Face folder, after comparing logits on real test batches.

    ``tolerance``: the largest difference of a logit; by default by the dtype of the weights. Raises ``ConfigError`` above it, and for an ``out`` in
    use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not empty. Choose a new folder.")
    setup = rebuild(path)
    if not setup.config.method.mergeable:
        raise ConfigError(f"method={setup.config.method.name} cannot be merged: it changes more than weights.")
    tolerance = TOLERANCE[setup.config.model.dtype] if tolerance is None else tolerance
    live = _logits(setup)
    merge_parts(setup.session.model, setup.session.states)
    setup.session.model.to(getattr(torch, setup.config.model.dtype))
    merged = _logits(setup)
    difference = max(float((a - b).abs().max()) for a, b in zip(live, merged, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(live, merged, strict=True)) / sum(a[..., 0].numel() for a in live)
    if not difference <= tolerance:
        raise ConfigError(
            f"The merged model's logits differ from the unmerged one's by {difference:.3g}, more than --tolerance {tolerance:g}; nothing was written."
        )
    if hasattr(setup.session.model.config, "use_cache"):
        setup.session.model.config.use_cache = True
    with replacing(out) as temporary:
        save(setup.session.model, setup.base.processor, temporary)
    return {"out": str(out), "largest_logit_difference": difference, "same_predictions": same, "tolerance": tolerance}


def _logits(setup: Setup, batches: int = 4) -> list[torch.Tensor]:
    data, session = setup.data["test"], setup.session
    session.tuned.eval()
    found = []
    size = setup.config.train.batch_size
    for start in range(0, min(len(data), batches * size), size):
        batch = collate([data[i] for i in range(start, min(start + size, len(data)))])
        with session.accelerator.autocast():
            found.append(session.tuned(**session.on_device(batch.inputs)).float().cpu())
    return found
