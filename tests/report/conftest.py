"""A result as result.json holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def result() -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        metrics = {"base": {"accuracy": 0.1025, "loss": 2.3}, "val": {"accuracy": 0.9, "loss": 0.3}, "test": {"accuracy": 0.9631, "loss": 0.2}}
        cost = {"step_seconds_median": 0.03125, "train_seconds": 12.34, "peak_memory_bytes": 512 << 20, "peak_memory_kind": "process_rss"}
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
