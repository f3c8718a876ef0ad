"""Fill docs/results.md: every sparse method on the built-in image and language tasks, at three sparsities, with three seeds.

    python scripts/results.py --jobs 2

Runs lie in outputs/results and finished ones are skipped, so it can be broken off and given again. Each worker is one process with one thread. LoRA's
rank is the one whose trained count is nearest to that of the sparse methods; S2FT's share of channels likewise. ``full``, ``hft`` and ``amt`` have no
such number and get a row of their own.
"""

from __future__ import annotations

import argparse
import json
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


def points() -> list[Point]:
    """All of them; those that are worth most, if time runs out, first."""
    alone = [(t, row, None, seed) for t, row, seed in product(TASKS, ALONE, SEEDS)]
    return sorted(
        [*alone, *product(TASKS, AT_SPARSITY, SPARSITIES, SEEDS)],
        key=lambda p: (p[2] not in (None, 0.99), p[3]),
    )


def matched(task: list[str], row: str, sparsity: float) -> list[str]:
    """The setting that gives this row the count of the sparsity."""
    from finetune.config.load import load
    from finetune.training.plan import plan

    if row not in ("lora, same count", "s2ft"):
        return [f"sparsity={sparsity}"]
    shapes = [layer["shape"] for layer in plan(load([*task, "method=shira"]))["layers"]]
    layers = [s for s in shapes if len(s) == 2 and min(s) > 10]  # without the head
    wanted = (1 - sparsity) * sum(a * b for a, b in layers)
    if row == "s2ft":
        down = sum(a * b for a, b in layers if b > a)
        return [f"method.d={min(1.0, wanted / down):.6f}"]
    return [f"method.rank={max(1, round(wanted / sum(a + b for a, b in layers)))}"]


def config_of(point: Point) -> Any:
    from finetune.config.load import load

    task, row, sparsity, seed = point
    common = [*TASKS[task][0], f"seed={seed}", "train.threads=1", "name=results", "logger=none"]
    more = ALONE[row] if sparsity is None else [*AT_SPARSITY[row], *matched(TASKS[task][0], row, sparsity)]
    return load([*common, *more])


def work(part: int, of: int, only_read: bool) -> None:
    """Run every ``of``-th point from ``part`` on, in this process, or only read what is finished."""
    from finetune.errors import FinetuneError
    from finetune.storage.run_folder import RunFolder, run_folder
    from finetune.training import run

    for point in points()[part::of]:
        try:
            config = config_of(point)
            folder = RunFolder(run_folder(replace(config, name="results", run=None)))
            if not folder.finished and only_read:
                continue
            if not folder.finished:
                run.train(config, folder.path, lambda line: None, lambda done, total, words: None)
            found = folder.read_result()
        except FinetuneError as error:
            found = {"status": "failed", "error": str(error)}
        print(json.dumps({"point": point, "result": found}), flush=True)


def spread(values: list[float], scale: float) -> str:
    shown = [v * scale for v in values]
    return (
        f"{statistics.mean(shown):.2f} ± {statistics.stdev(shown):.2f}"
        if len(shown) > 1
        else f"{shown[0]:.2f}"
    )


def cells(results: list[dict[str, Any]], metric: str) -> str:
    good = [r for r in results if r["status"] == "finished"]
    if not good:
        return f"failed: {results[0]['error'][:60]} | | |" if results else "not run | | |"
    scale = 100.0 if metric == "accuracy" else 1.0
    kept = [r["metrics"]["retention"] for r in good if r["metrics"].get("retention")]
    retention = spread([k[metric] for k in kept], scale) if kept and metric in kept[0] else ""
    trained = statistics.median(r["params"]["trained"] for r in good)
    return f"{spread([r['metrics']['test'][metric] for r in good], scale)} | {retention} | {trained:,.0f} |"


def claim(found: dict[Point, dict[str, Any]], task: str, a: str, b: str, split: str) -> list[str]:
    """Row ``a`` against row ``b``, seed by seed, at every sparsity."""
    metric, lines = TASKS[task][1], []
    for sparsity in SPARSITIES:
        pairs = [(found.get((task, a, sparsity, s)), found.get((task, b, sparsity, s))) for s in SEEDS]
        whole = [
            (x["metrics"], y["metrics"])
            for x, y in pairs
            if x and y and x["status"] == y["status"] == "finished"
        ]
        gaps = [x[split][metric] - y[split][metric] for x, y in whole if x.get(split) and y.get(split)]
        better = sum(g > 0 if metric == "accuracy" else g < 0 for g in gaps)
        if gaps:
            lines.append(
                f"| {task} | {a} against {b} | {sparsity:g} | {split} | {statistics.mean(gaps):+.4f} | {better} of {len(gaps)} |"
            )
    return lines


def report(found: dict[Point, dict[str, Any]]) -> str:
    lines = []
    for task, (settings, metric) in TASKS.items():
        lines += [
            f"### {task}: {metric} ({' '.join(settings)})",
            "",
            f"| method | sparsity | test {metric} | retention {metric} | trained |",
        ]
        lines.append("|---|---|---|---|---|")
        bases = [r["metrics"] for p, r in found.items() if p[0] == task and r["status"] == "finished"][:1]
        for b in bases:
            scale = 100.0 if metric == "accuracy" else 1.0
            kept = (b.get("base_retention") or {}).get(metric)
            shown = "" if kept is None else f"{kept * scale:.2f}"
            lines.append(f"| base, untrained | | {b['base'][metric] * scale:.2f} | {shown} | 0 |")
        for row in ALONE:
            lines.append(
                f"| {row} | | {cells([found[p] for p in found if p[:3] == (task, row, None)], metric)}"
            )
        for sparsity, row in product(SPARSITIES, AT_SPARSITY):
            lines.append(
                f"| {row} | {sparsity:g} | {cells([found[p] for p in found if p[:3] == (task, row, sparsity)], metric)}"
            )
        lines.append("")
    lines += [
        "### The two claims",
        "",
        "| task | what | sparsity | split | mean difference | better in |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for a, b in [("smallest magnitude", "super_tuning"), ("smallest magnitude", "shira, random")]:
            lines += claim(found, task, a, b, "retention")
        for a in ("spiel, AG", "spiel, MA"):
            lines += claim(found, task, a, "shira, random", "test")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--read", action="store_true", help="run nothing: only tabulate what is finished")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is not None:
        work(given.part, given.jobs, given.read)
        return
    import os

    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [
        sys.executable,
        __file__,
        *(["--read"] if given.read else []),
        "--jobs",
        str(given.jobs),
        "--part",
    ]
    workers = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=quiet)
        for i in range(given.jobs)
    ]
    found: dict[Point, dict[str, Any]] = {}
    for worker in workers:
        assert worker.stdout
        for line in worker.stdout:
            entry = json.loads(line)
            found[tuple(entry["point"])] = entry["result"]
            print(
                f"{len(found)}/{len(points())} {entry['point']} {entry['result']['status']}",
                file=sys.stderr,
                flush=True,
            )
    file = ROOT / "docs" / "results.md"
    before, _, rest = file.read_text().partition("<!-- results -->\n")
    file.write_text(
        f"{before}<!-- results -->\n{report(found)}\n<!-- /results -->{rest.partition('<!-- /results -->')[2]}"
    )


if __name__ == "__main__":
    main()
