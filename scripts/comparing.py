"""Measure how long `finetune compare` takes on many finished runs, and how much memory it needs.

    python scripts/comparing.py                       # 1,000 runs of 500 test examples, as a Markdown table
    python scripts/comparing.py --runs 200 --rounds 1

The runs are invented, but their files are like those of real runs: ten methods, several sparsities, five
seeds. The wall time is that of the whole command; the table has the minimum and the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from finetune.config.settings import LoggerConfig, ModelConfig, TrainConfig, to_plain
from finetune.optim.adamw import AdamW

METHODS = ("lora", "snell", "spiel", "shira", "sara", "lift", "spt", "s2ft", "id3", "hft")
SEEDS = 5
VERSIONS = {
    "finetune": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
}
HELPER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
seconds, cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
print(seconds, cpu, used.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
"""


def main() -> None:
    """Write the runs, time three commands, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / "outputs" / "sweep"
        write_runs(sweep, given.runs, given.examples)
        print(f"{given.runs:,} runs of {given.examples} test examples, {os.cpu_count()} cores\n")
        print("| command | minimum, s | median, s | CPU time, s | peak memory, MiB |")
        print("|---|---:|---:|---:|---:|")
        for options in ("", "--json", "--out table.csv"):
            words = options.replace("table.csv", str(Path(folder) / "table.csv")).split()
            measured = [measure_command(["compare", str(sweep), *words]) for _ in range(given.rounds)]
            seconds, cpu, peak = zip(*measured, strict=True)
            command = f"finetune compare outputs/sweep {options}".strip()
            times = f"{min(seconds):.2f} | {statistics.median(seconds):.2f} | {min(cpu):.2f}"
            print(f"| `{command}` | {times} | {max(peak) / 2**20:.0f} |", flush=True)


def measure_command(words: list[str]) -> tuple[float, float, int]:
    """Return the wall seconds, CPU seconds and peak resident bytes of one command.

    A small helper starts the command: the kernel adds the memory of the process that forks it to its peak.
    """
    done = subprocess.run(
        [sys.executable, "-c", HELPER, sys.executable, "-m", "finetune", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, cpu, peak, code = done.stdout.split()
    if code != "0":
        raise SystemExit(f"finetune {' '.join(words)} ended with code {code}.")
    return float(seconds), float(cpu), int(peak)


def write_runs(sweep: Path, runs: int, examples: int) -> None:
    """Write folders of finished runs with every file that `compare` reads."""
    random = np.random.default_rng(0)
    difficulty, labels = random.normal(0, 2, examples), random.integers(0, 10, examples)
    ids = pa.array([f"digit-{i:04d}" for i in range(examples)])
    levels = -(-runs // (len(METHODS) * SEEDS))
    points = [(method, level, seed) for method in METHODS for level in range(levels) for seed in range(SEEDS)]
    for method, level, seed in points[:runs]:
        strength = 2 + 0.1 * METHODS.index(method) - 1.5 * level / levels + random.normal(0, 0.1)
        right = difficulty + random.normal(0, 1, examples) < strength
        folder = sweep / f"{method}-tiny_vit-digits-s{seed}-{level:010x}"
        write_run(folder, method, level / levels, seed, (ids, labels, right))


def write_run(
    folder: Path, method: str, sparsity: float, seed: int, predictions: tuple[Any, Any, Any]
) -> None:
    """Write a run folder; ``predictions`` are ids, true classes, and which answers are right."""
    folder.mkdir(parents=True)
    ids, labels, right = predictions
    config: dict[str, Any] = {
        "name": "sweep",
        "run": folder.name,
        "seed": seed,
        "model": to_plain(ModelConfig("tiny_vit", "builtin:tiny_vit")),
        "method": {"name": method, "targets": ["all"], "rank": 8, "sparsity": sparsity},
        "dataset": {"name": "digits"},
        "optimizer": to_plain(AdamW()),
        "train": to_plain(TrainConfig()),
        "logger": to_plain(LoggerConfig()),
    }
    plain = json.loads(json.dumps(config))
    (folder / "config.yaml").write_text(yaml.dump(plain, Dumper=yaml.CSafeDumper, sort_keys=False))
    group = f"{method}-{sparsity}"
    result = {
        "format": 1,
        "status": "finished",
        "error": None,
        "method": method,
        "model": "tiny_vit",
        "model_path": "builtin:tiny_vit",
        "dataset": "digits",
        "seed": seed,
        "metrics": {
            "base": {"accuracy": 0.1, "loss": 2.3},
            "val": {"accuracy": 0.9, "loss": 0.4},
            "test": {"accuracy": float(right.mean()), "loss": 0.4},
        },
        "params": {"trained": 100_000, "adapted": 984_330, "total": 1_008_522},
        "stored_bytes": 400_000,
        "cost": {
            "step_seconds_median": 0.16,
            "train_seconds": 17.2,
            "peak_memory_bytes": 700_000_000,
            "peak_memory_kind": "process_rss",
        },
        "steps": 200,
        "best_step": 200,
        "device": "cpu",
        "versions": VERSIONS,
        "git_commit": None,
        "config_hash": f"{group}-{seed}",
        "group_hash": group,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    lines = []
    for step in range(1, 201):
        lines.append(json.dumps({"step": step, "loss": 2.0 / step, "lr": 0.001, "seconds": 0.16}))
    for step in (50, 100, 150, 200):
        lines.append(json.dumps({"step": step, "val_accuracy": 0.9, "val_loss": 0.4}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "delta").mkdir()
    (folder / "delta" / "delta.json").write_text(
        json.dumps({"format": 1, "method": method, "config": plain, "base_fingerprint": "0" * 64})
    )
    table = {
        "id": ids,
        "label": labels,
        "prediction": np.where(right, labels, (labels + 1) % 10),
        "score": np.full(len(labels), 0.9),
    }
    pq.write_table(pa.table(table), folder / "predictions.parquet")


if __name__ == "__main__":
    main()
