"""Runs without training, for tests of searches and tuning: accuracy is a known function of the rate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finetune.sweep.grid import Point

started: list[tuple[str, float]] = []  # runs that were really begun, and the learning rate of each


def accuracy(lr: float, step: int, steps: int) -> float:
    """Best at 0.003, and better with every step."""
    return max(0.0, 1 - 0.2 * abs(math.log10(lr / 0.003))) * (0.5 + 0.5 * step / steps)


class FakePool:
    """Has the interface of ``finetune.sweep.pool.Pool`` and one place.

    ``pause``: seconds that pass at each validation of a run.
    """

    pause = 0.0
    places = 1

    def __init__(self, jobs: int | None, say: Callable[[str], None], **_: Any) -> None: ...

    def run(
        self,
        points: Iterable[Point],
        ended: Callable[[Point, dict[str, Any]], None] = lambda point, result: None,
        verdict: Callable[[Point], str | None] = lambda point: None,
    ) -> dict[Path, dict[str, Any]]:
        results = {}
        for point in points:
            assert point.folder.config.is_file()
            result = (
                point.folder.read_result() if point.folder.result.is_file() else self.train(point, verdict)
            )
            results[point.folder.path] = result
            ended(point, result)
        return results

    def train(self, point: Point, verdict: Callable[[Point], str | None]) -> dict[str, Any]:
        lr, steps = point.config.optimizer.lr, point.config.train.steps
        started.append((point.folder.path.name, lr))
        point.folder.metrics.unlink(missing_ok=True)
        result = (
            {"format": 1, "status": "failed", "error": "the loss is nan", "metrics": {}, "steps": 0}
            if lr > 1
            else None
        )
        for step in range(1, steps + 1) if result is None else ():
            time.sleep(self.pause)
            with point.folder.metrics.open("a") as file:
                val = {"val_accuracy": accuracy(lr, step, steps), "val_loss": 1.0} if step % 2 == 0 else {}
                file.write(json.dumps({"step": step, "loss": 1.0, **val}) + "\n")
            if why := verdict(point):
                return {"status": "stopped", "error": why}
        val = {"accuracy": accuracy(lr, steps, steps), "loss": 1.0}
        metrics = {"val": val, "test": {"accuracy": 0.0, "loss": 9.0}}
        result = result or {
            "format": 1,
            "status": "finished",
            "error": None,
            "metrics": metrics,
            "steps": steps,
        }
        point.folder.result.write_text(json.dumps(result))
        return result
