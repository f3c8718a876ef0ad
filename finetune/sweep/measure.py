"""Measure a few steps of a configuration in a process of its own and in a temporary folder.

``python -m finetune.sweep.measure PARENT OPTIONS CONFIG`` is that process; it prints the result as JSON.
Imports no torch at the top.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config.load import load
from ..config.settings import Config
from ..errors import FinetuneError
from ..launch.start import StartOptions, child_command, child_main
from ..storage.run_folder import RunFolder
from ..system.environment import child_environment, cuda_memory

STEPS = 4  # optimizer steps of a measurement


@dataclass(frozen=True)
class Measurement:
    """Seconds of one step, of one evaluation and of everything else in a run, and its peak memory.

    Seconds are missing if the run failed (``fault`` says why), or if it was not trained because it would not
    fit into memory.
    """

    step: float | None = None
    evaluation: float = 0.0
    fixed: float = 0.0
    memory_bytes: int | None = None
    fault: str | None = None

    def seconds(self, config: Config) -> float | None:
        """Return how long a run of ``config`` takes; ``None`` if that is unknown."""
        if self.step is None:
            return None
        steps, every = config.train.steps, config.train.eval_every
        validations = 1
        if every:
            validations += (steps - 1) // every
        return self.fixed + steps * self.step + validations * self.evaluation


def measure(config: Config, options: StartOptions) -> Measurement:
    """Train a few steps of ``config`` in another process, and measure them there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(config.as_dict()), encoding="utf-8")  # JSON is YAML
        done = subprocess.run(
            child_command(__name__, options, str(file)),
            env=child_environment(None, None),
            capture_output=True,
            text=True,
        )
    try:
        return Measurement(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Measurement(fault=_fault(done))


def _fault(done: subprocess.CompletedProcess[str]) -> str:
    """Return why a process ended without a measurement."""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else f"exit code {done.returncode}"


def room_for_one(jobs: int) -> int:
    """Return the bytes that each of ``jobs`` parallel runs may use: a GPU's, or a share of the free RAM."""
    import psutil

    if gpus := cuda_memory():
        return min(gpus)
    return int(psutil.virtual_memory().available) // max(1, jobs)


def measure_here(config: str, options: StartOptions) -> int:
    """Measure the configuration in a file and print the result, in the process that ``measure`` starts."""
    print(json.dumps(asdict(_measure_run(Path(config), room_for_one(1)))))
    return 0


def _measure_run(file: Path, room: int) -> Measurement:
    """Train a few steps of the configuration in ``file``, unless it needs more than ``room`` bytes."""
    import psutil

    from ..training import run
    from ..training.plan import plan

    imports = time.time() - psutil.Process().create_time()
    try:
        config = load([], config_file=file)
        expected = int(plan(config)["expected_peak_memory_bytes"])
        if expected > room:
            return Measurement(memory_bytes=expected)
        train = replace(
            config.train,
            steps=min(STEPS, config.train.steps),
            eval_every=None,
            save_every=None,
            max_seconds=None,
            patience=None,
        )
        short = replace(config, train=train, logger=replace(config.logger, name="jsonl"))
        folder, began = RunFolder(file.parent / "run"), time.time()
        result = run.train(short, folder.path, lambda line: None, lambda done, total, words: None)
    except FinetuneError as error:
        return Measurement(fault=" ".join(str(error).split()))
    cost, took = result["cost"], time.time() - began
    evaluation = max(0.0, folder.predictions.stat().st_mtime - folder.metrics.stat().st_mtime)
    return Measurement(
        step=cost["step_seconds_median"],
        evaluation=evaluation,
        fixed=max(0.0, imports + took - cost["train_seconds"] - evaluation),
        memory_bytes=cost["peak_memory_bytes"],
    )


if __name__ == "__main__":
    child_main(measure_here)
