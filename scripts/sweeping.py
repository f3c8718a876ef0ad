"""What a sweep costs beside its runs: seconds from a run's start to its first step, and runs per minute with --jobs 2 against --jobs 1.

    python scripts/sweeping.py --runs 4

The built-in image task, one thread a run. Give the machine nothing else to do meanwhile; the load before each measurement is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from finetune import sweep
from finetune.launch.start import NO_OPTIONS
from finetune.sweep.lines import tail
from finetune.sweep.pool import Pool
from finetune.sweep.process import Process

WORDS = ["method=snell", "train.threads=1", "train.device=cpu", "train.eval_every=null"]


def overhead(seed: int, warm: bool) -> float:
    """Seconds from starting the process to the beginning of its first step; ``warm``: forked, as a sweep does, from one that has imported all."""
    (point,) = sweep.points([*WORDS, "train.steps=2", f"seed={seed}", f"name=warm{warm}"])
    sweep.freeze([point])
    began = time.time()
    process = Process.start(point, NO_OPTIONS, threads=1, fork=warm)
    assert process
    first = None
    while process.poll() is None:
        lines = tail(point.folder.metrics) if first is None else []
        if lines:
            first = time.time() - began - lines[0]["seconds"]
        time.sleep(0.01)
    assert first is not None, point.folder.log.read_text()
    return first


def minutes(jobs: int, runs: int, steps: int) -> float:
    """Wall time of a sweep, in minutes."""
    points = sweep.points([*WORDS, f"train.steps={steps}", f"seed=range(0,{runs})", f"name=jobs{jobs}"])
    sweep.freeze(points)
    began = time.perf_counter()
    results = Pool(jobs, lambda line: None, gpus=[]).run(points)
    took = time.perf_counter() - began
    assert all(result["status"] == "finished" for result in results.values())
    return took / 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4, help="how many runs each sweep has")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        load = [os.getloadavg()[0]]
        fresh = [overhead(seed, False) for seed in range(args.runs)]
        starts = [overhead(seed, True) for seed in range(args.runs + 1)]
        speed = {}
        for jobs in (1, 2):
            load.append(os.getloadavg()[0])
            speed[jobs] = args.runs / minutes(jobs, args.runs, args.steps)
        os.chdir(Path(__file__).parent)
    told = {
        "seconds_to_first_step": {
            "median": round(statistics.median(starts), 2),
            "first (imports)": round(starts[0], 2),
            "each": [round(s, 2) for s in starts[1:]],
            "a new interpreter each": [round(s, 2) for s in fresh],
        },
        "runs_per_minute": {f"jobs {jobs}": round(value, 2) for jobs, value in speed.items()},
        "ratio": round(speed[2] / speed[1], 2),
        "load_before": [round(value, 1) for value in load],
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
