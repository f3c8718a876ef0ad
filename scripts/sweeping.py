"""Measure what a sweep costs beside its runs.

    python scripts/sweeping.py --runs 4

Prints the seconds from the start of a run to its first step, and the runs per minute with --jobs 1 and --jobs
2. The task is the built-in image task with one thread per run. The machine should be idle otherwise; the load
before each measurement is printed, too.
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
from finetune.sweep.lines import read_last_lines
from finetune.sweep.pool import Pool
from finetune.sweep.process import Process

WORDS = ["method=snell", "train.threads=1", "train.device=cpu", "train.eval_every=null"]


def time_to_first_step(seed: int, warm: bool) -> float:
    """Return the seconds from the start of a process to the beginning of its first step.

    ``warm``: fork the process from one that has imported everything, as a sweep does.
    """
    (point,) = sweep.list_points([*WORDS, "train.steps=2", f"seed={seed}", f"name=warm{warm}"])
    sweep.freeze([point])
    began = time.time()
    process = Process.start(point, NO_OPTIONS, threads=1, fork=warm)
    assert process
    elapsed = None
    while process.poll() is None:
        if elapsed is None:
            lines = read_last_lines(point.folder.metrics)
            if lines:
                elapsed = time.time() - began - lines[0]["seconds"]
        time.sleep(0.01)
    assert elapsed is not None, point.folder.log.read_text()
    return elapsed


def time_sweep(jobs: int, runs: int, steps: int) -> float:
    """Return the wall time of a sweep in minutes."""
    points = sweep.list_points([*WORDS, f"train.steps={steps}", f"seed=range(0,{runs})", f"name=jobs{jobs}"])
    sweep.freeze(points)
    began = time.perf_counter()
    results = Pool(jobs, lambda line: None, gpus=[]).run(points)
    took = time.perf_counter() - began
    assert all(result["status"] == "finished" for result in results.values())
    return took / 60


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4, help="runs of each sweep")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        load = [os.getloadavg()[0]]
        fresh = [time_to_first_step(seed, warm=False) for seed in range(args.runs)]
        forked = [time_to_first_step(seed, warm=True) for seed in range(args.runs + 1)]
        speed = {}
        for jobs in (1, 2):
            load.append(os.getloadavg()[0])
            speed[jobs] = args.runs / time_sweep(jobs, args.runs, args.steps)
        os.chdir(Path(__file__).parent)
    figures = {
        "seconds_to_first_step": {
            "median": round(statistics.median(forked), 2),
            "first (imports)": round(forked[0], 2),
            "each": [round(seconds, 2) for seconds in forked[1:]],
            "a new interpreter each": [round(seconds, 2) for seconds in fresh],
        },
        "runs_per_minute": {f"jobs {jobs}": round(value, 2) for jobs, value in speed.items()},
        "ratio": round(speed[2] / speed[1], 2),
        "load_before": [round(value, 1) for value in load],
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
