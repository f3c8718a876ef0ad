"""What a sweep would take, before it starts: time and memory of each point, from finished runs like it or else from a few measured steps.

``python -m finetune.sweep.forecast PARENT OPTIONS CONFIG`` makes those steps in a process of its own, in a temporary folder.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.load import load
from ..config.settings import Config
from ..launch.start import NO_OPTIONS, StartOptions, child_command, child_main
from ..storage.result import group_hash
from ..storage.run_folder import RunFolder
from ..system import safe
from .grid import Point
from .process import again, environment
from .status import duration

if TYPE_CHECKING:
    from .tune import Tuning

STEPS = 4  # how many a measurement makes
Row = dict[str, Any]


def forecast(
    runs: Sequence[Point], jobs: int, retry: bool = False, say: Callable[[str], None] = lambda line: None, room: int | None = None,
    tuning: Tuning | None = None, options: StartOptions = NO_OPTIONS,
) -> Row:  # fmt: skip
    """The folder, every run with what would become of it, and totals; writes nothing.

    A run has ``seconds`` and ``memory_bytes`` (``None`` where nothing tells), ``fits`` (in ``room`` bytes, by default this machine's share for one of
    ``jobs`` runs at once), and ``fault`` where a measurement failed. The total of seconds is for ``jobs`` at once. With ``tuning`` the trials come
    first; a run of which they have still to choose the value has no name yet.
    """
    tried = tuning.tried if tuning else []
    runs, later = tuning.foreseen(_there(tried, retry)) if tuning else (runs, [])
    room = room or memory(jobs)
    known, measured = _known(), dict[str, Row]()
    rows = []
    for i, point in enumerate([*tried, *runs, *later]):
        follows = i >= len(tried) + len(runs)
        would = "follow its trials" if follows else _would(point, retry)
        row: Row = {
            "run": None if follows else point.folder.path.name,
            "settings": point.label,
            "seed": point.config.seed,
            "would": would,
        }
        rows.append(row | {"seconds": None, "memory_bytes": None, "fits": None, "fault": None})
        if would.startswith("be "):
            continue
        siblings = known.get(group_hash(point.config))
        if siblings:
            seconds = [s for s, _ in siblings if s is not None]
            rows[-1] |= {
                "seconds": statistics.median(seconds) if seconds else None,
                "memory_bytes": max(m for _, m in siblings),
            }
        else:
            kind = _kind(point.config)
            if kind not in measured:
                measured[kind] = _measure(point.config, say, options)
            rows[-1] |= _from(measured[kind], point.config)
        used = rows[-1]["memory_bytes"]
        rows[-1]["fits"] = None if used is None else used <= room
    total = _total(rows, jobs, room) | (
        {"trials": len(tried), "trials_to_run": sum(_new(row) for row in rows[: len(tried)])}
        if tuning
        else {}
    )
    return {"folder": str([*runs, *later][0].folder.path.parent), "runs": rows, "total": total}


def _there(points: Sequence[Point], retry: bool) -> dict[Path, Row]:
    """The results of the points that would not be run."""
    return {
        point.folder.path: point.folder.read_result()
        for point in points
        if _would(point, retry).startswith("be ")
    }


def _new(row: Row) -> bool:
    return not str(row["would"]).startswith("be ")


def _would(point: Point, retry: bool) -> str:
    folder = point.folder
    if folder.finished:
        return "be skipped: finished"
    if folder.result.is_file():
        result = folder.read_result()
        if not retry and not again(result):
            return "be kept: failed"
    return "go on" if any((folder.path / "checkpoints").glob("step-*")) else "start"


def _total(rows: Sequence[Row], jobs: int, room: int) -> Row:
    new = [row for row in rows if _new(row)]
    seconds = [row["seconds"] for row in new]
    return {
        "runs": len(rows),
        "finished": sum(row["would"] == "be skipped: finished" for row in rows),
        "to_run": len(new),
        "seconds": sum(seconds) / min(jobs, max(1, len(new))) if None not in seconds else None,
        "peak_memory_bytes": max((row["memory_bytes"] for row in new if row["memory_bytes"]), default=None),
        "room_bytes": room,
        "cannot_fit": sum(row["fits"] is False for row in rows),
    }


def _known() -> dict[str, list[tuple[float | None, int]]]:
    """Seconds and peak bytes of every finished run under ``outputs``, by its configuration without the seed."""
    found: dict[str, list[tuple[float | None, int]]] = {}
    for file in Path("outputs").glob("*/*/result.json"):
        try:
            result = safe.read_json(file, {"status": str, "cost": object})
            if result["status"] == "finished" and not safe.differs(
                result, {"cost": {"peak_memory_bytes": int}, "group_hash": str}
            ):
                found.setdefault(result["group_hash"], []).append(
                    (duration(RunFolder(file.parent)), result["cost"]["peak_memory_bytes"])
                )
        except (OSError, ValueError):
            continue
    return found


def _kind(config: Config) -> str:
    """What decides the time of a step, roughly: runs of one kind are measured once."""
    about = (
        config.method.name,
        config.selector.name,
        config.model,
        config.dataset,
        replace(config.train, steps=1),
    )
    return repr(about)


def _from(probe: Row, config: Config) -> Row:
    if probe.get("step") is None:
        return {"memory_bytes": probe.get("memory_bytes"), "fault": probe.get("fault")}
    steps, every = config.train.steps, config.train.eval_every
    validations = 1 + ((steps - 1) // every if every else 0)
    return {
        "seconds": probe["fixed"] + steps * probe["step"] + validations * probe["evaluation"],
        "memory_bytes": probe["memory_bytes"],
    }


def _measure(config: Config, say: Callable[[str], None], options: StartOptions) -> Row:
    """A few steps of ``config`` in a process of its own."""
    say(f"Measuring {STEPS} steps of method={config.method.name} on {config.dataset.name}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(config.as_dict()), encoding="utf-8")  # JSON is YAML
        done = subprocess.run(
            child_command(__name__, options, str(file)),
            env=environment(None, None),
            capture_output=True,
            text=True,
        )
    try:
        probe: Row = json.loads(done.stdout.splitlines()[-1])
        return probe
    except (IndexError, ValueError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].removeprefix("Error: ") if lines else f"exit code {done.returncode}"
        if done.returncode < 0:
            why = f"ended by signal {-done.returncode}"
        return {"step": None, "memory_bytes": None, "fault": why}


def measure(config: str, options: StartOptions) -> int:
    """Print what ``probe`` finds as JSON on standard output; what the process for ``_measure`` runs."""
    print(json.dumps(probe(Path(config), memory(1))))
    return 0


def probe(file: Path, room: int) -> Row:
    """Seconds of one step, of one evaluation and of all else, and peak bytes. What needs more than ``room`` bytes is only planned."""
    import psutil

    from ..errors import FinetuneError
    from ..training import run
    from ..training.plan import plan

    began = time.time()
    start = began - psutil.Process().create_time()
    try:
        config = load([], config_file=file)
        expected = int(plan(config)["expected_peak_memory_bytes"])
        if expected > room:
            return {"step": None, "memory_bytes": expected, "fault": None}
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
        return {"step": None, "memory_bytes": None, "fault": " ".join(str(error).split())}
    cost, whole = result["cost"], time.time() - began
    evaluation = max(0.0, folder.predictions.stat().st_mtime - folder.metrics.stat().st_mtime)
    fixed = max(0.0, start + whole - cost["train_seconds"] - evaluation)
    return {
        "step": cost["step_seconds_median"],
        "evaluation": evaluation,
        "fixed": fixed,
        "memory_bytes": cost["peak_memory_bytes"],
    }


def memory(jobs: int) -> int:
    """Bytes that one of ``jobs`` runs may take: a GPU's, where there is one, else its share of what is free."""
    import psutil

    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        sizes = [int(line) * 2**20 for line in done.stdout.splitlines() if line.strip().isdigit()]
    except (OSError, subprocess.SubprocessError):
        sizes = []
    return min(sizes) if sizes else int(psutil.virtual_memory().available) // max(1, jobs)


if __name__ == "__main__":
    child_main(measure)
