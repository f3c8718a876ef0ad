"""Write run folders with results and predictions, without training, by the functions that a run uses."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from finetune.config.settings import LoggerConfig, ModelConfig, TrainConfig
from finetune.optim.adamw import AdamW
from finetune.storage.atomic import write_json_atomic, write_yaml_atomic
from finetune.storage.rows import write_predictions

MakeRun = Callable[..., Path]
COST = {
    "step_seconds_median": 0.03125,
    "train_seconds": 12.34,
    "peak_memory_bytes": 512 << 20,
    "peak_memory_kind": "process_rss",
}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run folder into ``tmp_path/outputs/sweep`` and returns it.

    ``right`` says which test examples the run predicts correctly; ``bits`` gives bits and bytes of each
    window of a language model instead. ``result`` changes keys of result.json. Other keywords are settings:
    ``method__rank=4``.
    """

    def write(
        method: str,
        seed: int = 0,
        right: Sequence[int] | None = None,
        bits: Sequence[tuple[float, int]] | None = None,
        ids: Sequence[str] | None = None,
        status: str = "finished",
        result: dict[str, Any] | None = None,
        tuning: dict[str, Any] | None = None,
        into: str = "sweep",
        **settings: Any,
    ) -> Path:
        config = make_config(method, seed, settings)
        folder = tmp_path / "outputs" / into / f"{method}-s{seed}-{hash_config(config)}"
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml_atomic(folder / "config.yaml", config)
        if status == "unfinished":
            return folder
        metrics: dict[str, Any] = {}
        if status == "finished" and right is not None:
            metrics = write_answers(folder, right, ids or name_examples(len(right)))
        elif status == "finished" and bits is not None:
            metrics = write_losses(folder, bits, ids or name_examples(len(bits)))
        elif status == "finished":
            metrics = {
                "base": {"accuracy": 0.1},
                "val": {"accuracy": 0.9},
                "test": {"accuracy": 0.9, "loss": 0.3},
            }
        content = make_result(method, seed) | {
            "status": status,
            "metrics": metrics,
            "dataset": config["dataset"]["name"],
            "config_hash": hash_config(config),
            "group_hash": hash_config({**config, "seed": 0}),
            "error": None if status == "finished" else "out of memory",
        }
        write_json_atomic(folder / "result.json", content | (result or {}))
        if tuning:
            write_json_atomic(folder / "tuning.json", {"format": 1, **tuning})
        return folder

    return write


def make_config(method: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a frozen configuration; a setting is named ``section__name``."""
    parts = {
        "model": ModelConfig("tiny_vit", "builtin:tiny_vit"),
        "optimizer": AdamW(),
        "train": TrainConfig(),
        "logger": LoggerConfig(),
    }
    config: dict[str, Any] = {
        "name": "sweep",
        "run": "r",
        "seed": seed,
        "method": {"name": method},
        "dataset": {"name": "digits"},
    }
    for section, part in parts.items():
        config[section] = json.loads(json.dumps(asdict(part)))
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def hash_config(config: dict[str, Any]) -> str:
    """Return a hash of the settings that make an experiment."""
    tree = {key: value for key, value in config.items() if key not in ("name", "run", "logger")}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:10]


def name_examples(count: int) -> list[str]:
    """Return ids of test examples."""
    return [f"e{i}" for i in range(count)]


def write_answers(folder: Path, right: Sequence[int], ids: Sequence[str]) -> dict[str, Any]:
    """Write the predictions of a classifier, and return the run's metrics."""
    rows = []
    for i, (name, is_right) in enumerate(zip(ids, right, strict=True)):
        label = i % 7
        rows.append({"id": name, "label": label, "prediction": label + (not is_right), "score": 0.5})
    write_predictions(folder / "predictions.parquet", rows)
    test = {"accuracy": sum(map(bool, right)) / len(right), "loss": 0.3}
    return {"base": {"accuracy": 0.1, "loss": 2.3}, "val": dict(test), "test": test}


def write_losses(folder: Path, bits: Sequence[tuple[float, int]], ids: Sequence[str]) -> dict[str, Any]:
    """Write the losses of a language model, and return the run's metrics."""
    rows = []
    for name, (count, size) in zip(ids, bits, strict=True):
        rows.append({"id": name, "loss": count * math.log(2), "bytes": size})
    write_predictions(folder / "predictions.parquet", rows)
    ratio = sum(count for count, _ in bits) / sum(size for _, size in bits)
    test = {"bits_per_byte": ratio, "perplexity": 9.0, "loss": 2.0}
    return {"base": {"bits_per_byte": 5.0, "loss": 4.0}, "val": dict(test), "test": test}


def make_result(method: str, seed: int) -> dict[str, Any]:
    """Return what every result.json has."""
    return {
        "format": 1,
        "method": method,
        "model": "tiny_vit",
        "model_path": "builtin:tiny_vit",
        "seed": seed,
        "cost": COST,
        "stored_bytes": 144_592,
        "params": {"trained": 35_082, "adapted": 800_000, "total": 1_012_234},
        "steps": 200,
        "best_step": 150,
        "device": "cpu",
        "versions": {"finetune": "0.1.0", "torch": "2.13.0"},
        "git_commit": "a" * 40,
    }
