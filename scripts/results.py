"""Fill docs/results.md: every sparse method on the built-in image and language tasks.

    python scripts/results.py --jobs 2

Each method is run at three sparsities with three seeds. The runs lie in outputs/results, and finished ones
are skipped, so the command can be interrupted and repeated. ``--row lt_sft`` makes one row anew and replaces
its lines in the tables; the lists of claims stay. Each worker is a process with one thread. The rank of
LoRA, and the share of channels of S2FT, are chosen so that the number of trained parameters is nearest to
that of the sparse methods. ``full``, ``hft`` and ``amt`` have no such setting and get a row of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPARSITIES, SEEDS = (0.9, 0.99, 0.999), (0, 1, 2)
SMALL = [
    "dataset.train_bytes=200000",
    "dataset.val_bytes=5000",
    "dataset.test_bytes=15000",
    "dataset.retention_bytes=15000",
]
TASKS = {
    "image": (["train.steps=40"], "accuracy"),
    "language": (
        ["model=tiny_lm", "dataset=stdlib", *SMALL, "train.steps=30", "train.batch_size=4"],
        "bits_per_byte",
    ),
}
OFTEN = "schedule.every=10"
AT_SPARSITY: dict[str, list[str]] = {
    "lora, same count": ["method=lora"],
    "shira, random": ["method=shira"],
    "shira, snip": ["method=shira", "method.score=snip"],
    "super_tuning": ["method=super_tuning"],
    "smallest magnitude": ["method=sparse", "method.score=magnitude", "method.direction=smallest"],
    "lift": ["method=lift", OFTEN],
    "sara": ["method=sara"],
    "spiel, AG": ["method=spiel", OFTEN, "method.window=2"],
    "spiel, MA": ["method=spiel", "method.criterion=ma", "optimizer=sm3", OFTEN, "method.window=2"],
    "lt_sft": ["method=lt_sft"],
    "id3": ["method=id3", "schedule.every=5"],
    "s2ft": ["method=s2ft"],
    "spt": ["method=spt", "method.batches=4"],
    "off_principal": ["method=off_principal"],
    "snella": ["method=snella"],
}
ALONE: dict[str, list[str]] = {"full": ["method=full"], "hft": ["method=hft"], "amt": ["method=amt"]}
Point = tuple[str, str, float | None, int]  # task, row, sparsity, seed
Result = dict[str, Any]  # the content of result.json, or the status and error of a run that could not start


def list_points() -> list[Point]:
    """Return all points; those that matter most come first, in case time runs out."""
    points: list[Point] = []
    for task, seed in product(TASKS, SEEDS):
        for row in ALONE:
            points.append((task, row, None, seed))
        for row, sparsity in product(AT_SPARSITY, SPARSITIES):
            points.append((task, row, sparsity, seed))
    return sorted(points, key=rank_point)


def rank_point(point: Point) -> tuple[bool, int]:
    """Sort points at sparsity 0.99, or without one, to the front, and then by seed."""
    _, _, sparsity, seed = point
    return sparsity not in (None, 0.99), seed


def match_count(task: list[str], row: str, sparsity: float) -> list[str]:
    """Return the setting with which this row trains as many parameters as sparse methods at ``sparsity``."""
    from finetune.config.load import load
    from finetune.training.plan import plan

    if row not in ("lora, same count", "s2ft"):
        return [f"sparsity={sparsity}"]
    entries = sides = growing = 0
    for layer in plan(load([*task, "method=shira"]))["layers"]:
        shape = layer["shape"]
        if len(shape) == 2 and min(shape) > 10:  # without the head
            entries += shape[0] * shape[1]
            sides += shape[0] + shape[1]
            if shape[1] > shape[0]:
                growing += shape[0] * shape[1]
    wanted = (1 - sparsity) * entries
    if row == "s2ft":
        return [f"method.d={min(1.0, wanted / growing):.6f}"]
    return [f"method.rank={max(1, round(wanted / sides))}"]


def load_config(point: Point) -> Any:
    """Return the configuration of a point."""
    from finetune.config.load import load

    task, row, sparsity, seed = point
    words = [*TASKS[task][0], f"seed={seed}", "train.threads=1", "name=results", "logger=none"]
    if sparsity is None:
        words += ALONE[row]
    else:
        words += [*AT_SPARSITY[row], *match_count(TASKS[task][0], row, sparsity)]
    return load(words)


def run_part(part: int, parts: int, only_read: bool, row: str | None) -> None:
    """Run every ``parts``-th point, beginning with ``part``, in this process.

    ``only_read`` skips unfinished runs, and ``row`` all points of other rows. Prints each point with its
    result as a line of JSON.
    """
    from finetune.errors import FinetuneError
    from finetune.storage.run_folder import RunFolder, run_folder
    from finetune.training import run

    points = [point for point in list_points() if row in (None, point[1])]
    for point in points[part::parts]:
        result: Result
        try:
            config = load_config(point)
            folder = RunFolder(run_folder(replace(config, name="results", run=None)))
            if not folder.finished and only_read:
                continue
            if not folder.finished:
                run.train(config, folder.path, lambda line: None, lambda done, total, words: None)
            result = folder.read_result()
        except FinetuneError as error:
            result = {"status": "failed", "error": str(error)}
        print(json.dumps({"point": point, "result": result}), flush=True)


def show_spread(values: list[float], scale: float) -> str:
    """Return the mean and the standard deviation over seeds."""
    scaled = [value * scale for value in values]
    if len(scaled) == 1:
        return f"{scaled[0]:.2f}"
    return f"{statistics.mean(scaled):.2f} ± {statistics.stdev(scaled):.2f}"


def get_scale(metric: str) -> float:
    """Return 100 for accuracies, which are shown in percent."""
    return 100.0 if metric == "accuracy" else 1.0


def write_cells(results: list[Result], metric: str) -> str:
    """Return the cells of a row: test metric, retention and trained parameters."""
    finished = [result for result in results if result["status"] == "finished"]
    if not results:
        return "not run | | |"
    if not finished:
        return f"failed: {results[0]['error'][:60]} | | |"
    tests, retentions, trained = [], [], []
    for result in finished:
        tests.append(result["metrics"]["test"][metric])
        trained.append(result["params"]["trained"])
        retention = result["metrics"].get("retention") or {}
        if metric in retention:
            retentions.append(retention[metric])
    scale = get_scale(metric)
    shown = show_spread(retentions, scale) if retentions else ""
    return f"{show_spread(tests, scale)} | {shown} | {statistics.median(trained):,.0f} |"


def write_claim(found: dict[Point, Result], task: str, a: str, b: str, split: str) -> list[str]:
    """Return a line for each sparsity that compares row ``a`` with row ``b``, seed by seed."""
    metric, lines = TASKS[task][1], []
    for sparsity in SPARSITIES:
        gaps = []
        for seed in SEEDS:
            first = get_metrics(found, (task, a, sparsity, seed)).get(split)
            second = get_metrics(found, (task, b, sparsity, seed)).get(split)
            if first and second:
                gaps.append(first[metric] - second[metric])
        if not gaps:
            continue
        better = sum(gap > 0 for gap in gaps)
        if metric != "accuracy":
            better = sum(gap < 0 for gap in gaps)
        compared = f"{a} against {b} | {sparsity:g} | {split}"
        lines.append(f"| {task} | {compared} | {statistics.mean(gaps):+.4f} | {better} of {len(gaps)} |")
    return lines


def get_metrics(found: dict[Point, Result], point: Point) -> dict[str, Any]:
    """Return the metrics of a point; empty if its run has not finished."""
    result = found.get(point)
    if result is None or result["status"] != "finished":
        return {}
    metrics: dict[str, Any] = result["metrics"]
    return metrics


def write_report(found: dict[Point, Result]) -> str:
    """Return a table for each task, and the claims, as Markdown."""
    lines = []
    for task in TASKS:
        lines += [*write_task(found, task), ""]
    lines += [
        "### The two claims",
        "",
        "| task | what | sparsity | split | mean difference | better in |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for other in ("super_tuning", "shira, random"):
            lines += write_claim(found, task, "smallest magnitude", other, "retention")
        for row in ("spiel, AG", "spiel, MA"):
            lines += write_claim(found, task, row, "shira, random", "test")
    return "\n".join(lines)


def write_task(found: dict[Point, Result], task: str) -> list[str]:
    """Return the lines of a task's table."""
    settings, metric = TASKS[task]
    lines = [
        f"### {task}: {metric} ({' '.join(settings)})",
        "",
        f"| method | sparsity | test {metric} | retention {metric} | trained |",
        "|---|---|---|---|---|",
    ]
    for point in found:
        metrics = get_metrics(found, point)
        if point[0] == task and metrics:
            lines.append(write_base(metrics, metric))
            break
    for row in ALONE:
        lines.append(f"| {row} | | {write_cells(find_results(found, task, row, None), metric)}")
    for sparsity, row in product(SPARSITIES, AT_SPARSITY):
        cells = write_cells(find_results(found, task, row, sparsity), metric)
        lines.append(f"| {row} | {sparsity:g} | {cells}")
    return lines


def replace_row(tables: str, found: dict[Point, Result], row: str) -> str:
    """Return the tables with new lines for one row."""
    lines, task = [], ""
    for line in tables.splitlines():
        if line.startswith("### "):
            task = line.removeprefix("### ").partition(":")[0]
        cells = line.split(" | ")
        if cells[0] == f"| {row}" and task in TASKS:
            sparsity = float(cells[1]) if row in AT_SPARSITY else None
            results = find_results(found, task, row, sparsity)
            line = f"| {row} | {cells[1]} | {write_cells(results, TASKS[task][1])}"
        lines.append(line)
    return "\n".join(lines)


def write_base(metrics: dict[str, Any], metric: str) -> str:
    """Return the row of the untrained model."""
    scale = get_scale(metric)
    retention = (metrics.get("base_retention") or {}).get(metric)
    shown = "" if retention is None else f"{retention * scale:.2f}"
    return f"| base, untrained | | {metrics['base'][metric] * scale:.2f} | {shown} | 0 |"


def find_results(found: dict[Point, Result], task: str, row: str, sparsity: float | None) -> list[Result]:
    """Return the results of all seeds of a row."""
    return [result for point, result in found.items() if point[:3] == (task, row, sparsity)]


def start_workers(jobs: int, only_read: bool, row: str | None) -> list[subprocess.Popen[str]]:
    """Start the processes that run or read the points."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--jobs", str(jobs)]
    if only_read:
        command.append("--read")
    if row:
        command += ["--row", row]
    workers = []
    for part in range(jobs):
        workers.append(
            subprocess.Popen([*command, "--part", str(part)], stdout=subprocess.PIPE, text=True, env=env)
        )
    return workers


def main() -> None:
    """Run all points in several processes, and write the tables into docs/results.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--read", action="store_true", help="run nothing: only tabulate what is finished")
    parser.add_argument("--row", choices=[*ALONE, *AT_SPARSITY], help="make this row of the tables alone")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is not None:
        run_part(given.part, given.jobs, given.read, given.row)
        return
    found: dict[Point, Result] = {}
    total = sum(given.row in (None, point[1]) for point in list_points())
    for worker in start_workers(given.jobs, given.read, given.row):
        assert worker.stdout
        for line in worker.stdout:
            entry = json.loads(line)
            found[tuple(entry["point"])] = entry["result"]
            status = f"{len(found)}/{total} {entry['point']} {entry['result']['status']}"
            print(status, file=sys.stderr, flush=True)
    file = ROOT / "docs" / "results.md"
    before, _, rest = file.read_text().partition("<!-- results -->\n")
    tables, _, after = rest.partition("\n<!-- /results -->")
    tables = replace_row(tables, found, given.row) if given.row else write_report(found)
    file.write_text(f"{before}<!-- results -->\n{tables}\n<!-- /results -->{after}")


if __name__ == "__main__":
    main()
