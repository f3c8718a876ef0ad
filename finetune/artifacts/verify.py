"""Whether a run keeps what is promised: its files whole, a resume equal to the bit, its numbers found again, its merge equal to it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import plugins
from ..config.load import load
from ..config.settings import Config, LoggerConfig
from ..errors import ConfigError, FinetuneError, RunFailed
from ..storage import manifest
from ..storage.delta import read_description, read_tensors
from ..storage.lock import refuse_if_locked
from ..storage.result import versions
from ..storage.run_folder import RunFolder
from ..system import safe
from .reopen import evaluate, run_of

Say = Callable[[str], None]
KEPT = (
    "status",
    "metrics",
    "params",
    "steps",
    "best_step",
    "suspect",
    "warnings",
    "batch",
)  # of result.json, what a repetition has to give again


class _Skipped(Exception):
    """Why a point means nothing for this run."""


def verify(path: Path, say: Say) -> dict[str, Any]:
    """Test the run at ``path``, which is only read; trains from its middle to its end in a scratch folder.

    Returns ``{"run", "verdict", "points": [{"point", "verdict", "words"}]}``; verdicts are pass, fail, and skipped (of the whole: unfinished).
    Raises ``ConfigError`` where ``path`` is no run, or one that another process works on.
    """
    files, _ = run_of(path)
    plugins.check_file(files.config)
    refuse_if_locked(files.path)
    points, threads = [], torch.get_num_threads()
    torch.set_num_threads(_threads(files) or threads)  # another number adds up in another order
    try:
        for name, test in (
            ("files", _files),
            ("predictions", _predictions),
            ("evaluation", _evaluation),
            ("resume", _resume),
            ("merge", _merge),
        ):
            say(f"Checking {name} ...")
            try:
                verdict, words = "pass", test(files, say)
            except _Skipped as reason:
                verdict, words = "skipped", f"{reason}"
            except (FinetuneError, OSError) as error:
                verdict, words = "fail", " ".join(f"{error}".split())
            points.append({"point": name, "verdict": verdict, "words": words})
    finally:
        torch.set_num_threads(threads)
    failed = any(point["verdict"] == "fail" for point in points)
    return {
        "run": str(path),
        "verdict": "fail" if failed else "pass" if files.finished else "unfinished",
        "points": points,
    }


def _threads(files: RunFolder) -> int | None:
    """How many the run had, if it says so."""
    try:
        said = files.read_result().get("threads")
    except ConfigError:
        return None
    return said if isinstance(said, int) and 0 < said < 1024 else None


def _config(files: RunFolder) -> Config:
    return load([], None, files.config)


def _result(files: RunFolder) -> dict[str, Any]:
    """Of a finished run; others leave nothing to compare with."""
    if not files.finished:
        raise _Skipped("the run has not finished")
    return files.read_result()


def _files(files: RunFolder, say: Say) -> str:
    """Every hash, the frozen configuration against the change's, and the lines of metrics."""
    safe.check_links(files.path)
    folders = [folder for folder in (files.delta, *map(files.checkpoint, files.steps())) if folder.exists()]
    faults = [fault for folder in folders for fault in manifest.faults(folder)]
    if files.delta.exists() and not faults:
        files.check_unaltered(read_description(files.delta)["config"], files.delta)
    _config(files)
    if files.result.exists():
        result = files.read_result()
        if files.metrics.exists() and result.get("status") == "finished":
            faults += _lines(files.metrics, result["steps"])
    if faults:
        raise ConfigError("; ".join(faults))
    older = sum(not (folder / manifest.NAME).exists() for folder in folders)
    aside = f", of {older} older ones without a manifest only the layout" if older else ""
    return f"{len(folders) - older} folders have the sizes and SHA-256 of their manifests{aside}; configuration and metrics fit them"


def _lines(file: Path, steps: int) -> list[str]:
    """Faults of ``metrics.jsonl``: one line of a loss for every step, in order."""
    try:
        rows = [safe.parse_json(line) for line in safe.read_lines(file)]
        seen = [row["step"] for row in rows if "loss" in row]
        falls = any(before["step"] > after["step"] for before, after in itertools.pairwise(rows))
    except (ValueError, KeyError, TypeError) as error:
        return [f"{file} has a line that is damaged ({error})"]
    return (
        []
        if seen == list(range(1, steps + 1)) and not falls
        else [f"{file} does not have one loss for each of {steps} steps, in order"]
    )


def _predictions(files: RunFolder, say: Say) -> str:
    """The stored answers give the test metrics of ``result.json``."""
    told, rows = _result(files)["metrics"]["test"], _rows(files)
    if "bits_per_byte" in told:
        key, found = (
            "bits_per_byte",
            math.fsum(row["loss"] for row in rows) / math.log(2) / sum(row["bytes"] for row in rows),
        )
    else:
        key, found = "accuracy", sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    if not math.isclose(found, told[key], rel_tol=1e-12):
        raise ConfigError(
            f"{files.predictions} gives a test {key} of {found:.9g}, and result.json says {told[key]:.9g}."
        )
    return f"{len(rows)} rows give the test {key} {found:.6g} of result.json"


def _rows(files: RunFolder) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(files.predictions).to_pylist()
        return rows
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{files.predictions} cannot be read ({error}).") from error


def _evaluation(files: RunFolder, say: Say) -> str:
    """The stored change, evaluated again, gives the metrics of ``result.json``."""
    result = _result(files)
    told, found = result["metrics"], evaluate(files.path)["metrics"]
    if wrong := [
        f"{split}: {_pair(told.get(split), metrics)}"
        for split, metrics in found.items()
        if metrics != told.get(split)
    ]:
        raise RunFailed(
            f"evaluated again, the stored change gives other numbers ({'; '.join(wrong)}){_since(result)}"
        )
    return f"the stored change gives the metrics of {', '.join(found)} again, to the bit"


def _pair(before: Any, after: Mapping[str, float]) -> str:
    told = before if isinstance(before, Mapping) else {}
    return ", ".join(
        f"{key} {told.get(key)} before, {value} now" for key, value in after.items() if told.get(key) != value
    )


def _since(result: Mapping[str, Any]) -> str:
    """Versions that are not those of the run."""
    before, now = result.get("versions") or {}, versions()
    changed = [
        f"{name} {before.get(name)} then and {version} now"
        for name, version in now.items()
        if before.get(name) != version
    ]
    return f"; {', '.join(changed)}" if changed else ""


def _resume(files: RunFolder, say: Say) -> str:
    """Going on from a checkpoint in the middle ends like the run itself."""
    result, config = _result(files), _config(files)
    if result["steps"] < config.train.steps and config.train.max_seconds:
        raise _Skipped(
            f"train.max_seconds={config.train.max_seconds} ended the run after {result['steps']} steps, which no repetition would meet"
        )
    if result.get("processes", 1) > 1:
        raise _Skipped(f"the run had {result['processes']} processes, and this is one")
    from ..training.run import train

    whole = [
        step
        for step in files.steps()
        if 0 < step < result["steps"] and not manifest.faults(files.checkpoint(step))
    ]
    start = min(whole, key=lambda step: abs(2 * step - result["steps"]), default=None)
    where = f"from step {start}" if start else "from the beginning, as no checkpoint of its middle is kept,"
    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as scratch:
        again = RunFolder(Path(scratch) / "run")
        again.path.mkdir()
        for file in (files.metrics, files.delta, files.checkpoint(start)) if start else ():
            _copy(file, again.path / file.relative_to(files.path))
        say(f"Training {where} to step {result['steps']} in {again.path} ...")
        shutil.copyfile(files.config, again.config)
        quiet = replace(config, logger=LoggerConfig()) if config.logger.name == "wandb" else config
        train(quiet, again.path, lambda line: None, lambda done, steps, words: None)
        if wrong := _unlike(files, again):
            raise RunFailed(
                f"the run {where} to step {result['steps']} did not end the same: {'; '.join(wrong)}{_since(result)}"
            )
    return f"the run {where} to step {result['steps']} ends with the same change, metrics, predictions and result, to the bit"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copyfile(source, target)


def _unlike(files: RunFolder, again: RunFolder) -> list[str]:
    """In what two finished runs differ."""
    before, after = files.read_result(), again.read_result()
    changed = [key for key in KEPT if key in before and before[key] != after.get(key)]
    found = [
        f"{key} of result.json was {_short(before[key])} and is {_short(after.get(key))}" for key in changed
    ]
    first, second = (read_tensors(folder.delta / "delta.safetensors") for folder in (files, again))
    changed = [name for name in sorted({*first, *second}) if not _equal(first.get(name), second.get(name))]
    found += (
        [f"{len(changed)} of {len(first)} stored tensors differ (first: {changed[0]})"] if changed else []
    )
    found += [] if _numbers(files) == _numbers(again) else ["metrics.jsonl differs"]
    return found + ([] if _rows(files) == _rows(again) else ["the predictions differ"])


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _numbers(files: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics but for what took time."""
    lines = (
        map(json.loads, files.metrics.read_text(encoding="utf-8").splitlines())
        if files.metrics.exists()
        else ()
    )
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _merge(files: RunFolder, say: Say) -> str:
    """The merged folder, read again, gives the logits of base and change."""
    _result(files)
    if not (method := _config(files).method).mergeable:
        raise _Skipped(f"method={method.name} cannot be merged: it changes more than weights")
    from .merge import merge

    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as scratch:
        found = merge(files.path, Path(scratch) / "merged")
    same = found["same_predictions"]
    return f"the merged folder's logits are within {found['largest_logit_difference']:.3g} of the run's, and {same:.2%} of its answers the same"
