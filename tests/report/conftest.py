"""Results as result.json holds them, and whole run folders."""

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
from finetune.storage.run_folder import write_json_atomic, write_predictions, write_yaml


@pytest.fixture
def result() -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        metrics = {
            "base": {"accuracy": 0.1025, "loss": 2.3},
            "val": {"accuracy": 0.9, "loss": 0.3},
            "test": {"accuracy": 0.9631, "loss": 0.2},
        }
        cost = {
            "step_seconds_median": 0.03125,
            "train_seconds": 12.34,
            "peak_memory_bytes": 512 << 20,
            "peak_memory_kind": "process_rss",
        }
        whole = {
            "status": "finished",
            "error": None,
            "method": "snell",
            "model": "tiny_vit",
            "model_path": "builtin:tiny_vit",
            "dataset": "digits",
            "seed": 0,
            "metrics": metrics,
            "params": {"trained": 35_082, "adapted": 800_000, "total": 1_012_234},
            "stored_bytes": 144_592,
            "cost": cost,
            "steps": 200,
            "best_step": 150,
            "group_hash": "aaaaaaaaaa",
        }
        return whole | changes

    return make


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder into ``tmp_path/outputs/sweep`` with the very functions that a run uses, and returns it.

    ``right``: which test examples it gets right; or ``bits``: bits and bytes of each window. Other words change settings (``method__rank=4``).
    """

    def make(
        method: str,
        seed: int = 0,
        right: Sequence[int] | None = None,
        bits: Sequence[tuple[float, int]] | None = None,
        ids: Sequence[str] | None = None,
        status: str = "finished",
        told: dict[str, Any] | None = None,
        tuning: dict[str, Any] | None = None,
        into: str = "sweep",
        **settings: Any,
    ) -> Path:
        config = _config(method, seed, settings)
        folder = tmp_path / "outputs" / into / f"{method}-s{seed}-{_hash(config)}"
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(folder / "config.yaml", config)
        if status == "unfinished":
            return folder
        metrics = _predict(folder, right, bits, ids) if status == "finished" else {}
        result = {
            **_result(method, seed),
            "status": status,
            "metrics": metrics,
            "dataset": config["dataset"]["name"],
        }
        result |= {"config_hash": _hash(config), "group_hash": _hash({**config, "seed": 0})}
        result["error"] = None if status == "finished" else "out of memory"
        write_json_atomic(folder / "result.json", result | (told or {}))
        if tuning:
            write_json_atomic(folder / "tuning.json", {"format": 1, **tuning})
        return folder

    return make


def _config(method: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
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
    config |= {name: json.loads(json.dumps(asdict(part))) for name, part in parts.items()}
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def _hash(config: dict[str, Any]) -> str:
    tree = {key: value for key, value in config.items() if key not in ("name", "run", "logger")}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:10]


def _predict(
    folder: Path,
    right: Sequence[int] | None,
    bits: Sequence[tuple[float, int]] | None,
    ids: Sequence[str] | None,
) -> dict[str, Any]:
    if right is None and bits is None:
        return {"base": {"accuracy": 0.1}, "val": {"accuracy": 0.9}, "test": {"accuracy": 0.9, "loss": 0.3}}
    count = len(right if right is not None else bits or [])
    names = list(ids) if ids is not None else [f"e{i}" for i in range(count)]
    if right is not None:
        told = enumerate(zip(names, right, strict=True))
        rows = [{"id": n, "label": i % 7, "prediction": i % 7 + (not r), "score": 0.5} for i, (n, r) in told]
        test = {"accuracy": sum(map(bool, right)) / count, "loss": 0.3}
        base = {"accuracy": 0.1, "loss": 2.3}
    else:
        rows = [
            {"id": n, "loss": b * math.log(2), "bytes": size}
            for n, (b, size) in zip(names, bits or [], strict=True)
        ]
        ratio = sum(b for b, _ in bits or []) / sum(size for _, size in bits or [])
        test, base = (
            {"bits_per_byte": ratio, "perplexity": 9.0, "loss": 2.0},
            {"bits_per_byte": 5.0, "loss": 4.0},
        )
    write_predictions(folder / "predictions.parquet", rows)
    return {"base": base, "val": dict(test), "test": test}


def _result(method: str, seed: int) -> dict[str, Any]:
    cost = {
        "step_seconds_median": 0.03125,
        "train_seconds": 12.34,
        "peak_memory_bytes": 512 << 20,
        "peak_memory_kind": "process_rss",
    }
    return {
        "format": 1, "method": method, "model": "tiny_vit", "model_path": "builtin:tiny_vit", "seed": seed, "cost": cost, "stored_bytes": 144_592,
        "params": {"trained": 35_082, "adapted": 800_000, "total": 1_012_234}, "steps": 200, "best_step": 150, "device": "cpu",
        "versions": {"finetune": "0.1.0", "torch": "2.13.0"}, "git_commit": "a" * 40,
    }  # fmt: skip
