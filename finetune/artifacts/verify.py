"""Verify what is promised of a run.

Its files are complete, its metrics can be computed again, a resume ends with the same bits, and the merged
model computes the same logits.
"""

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

from ..config import plugin_records
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
# The keys of result.json that a repetition must reproduce.
REPEATED = ("status", "metrics", "params", "changed", "steps", "best_step", "suspect", "warnings", "batch")


class _Skipped(Exception):
    """Raised with the reason why a check does not apply to this run."""


def verify(path: Path, say: Say) -> dict[str, Any]:
    """Run every check on the run at ``path``, which is only read.

    One check trains from the middle of the run to its end, in a scratch folder. Returns ``{"run", "verdict",
    "points": [{"point", "verdict", "words"}]}``. A verdict is pass, fail or skipped; that of the whole is
    pass, fail or unfinished. Raises ``ConfigError`` if ``path`` is not a run, or another process works on it.
    """
    files, _ = run_of(path)
    plugin_records.check_file(files.config)
    refuse_if_locked(files.path)
    points, threads = [], torch.get_num_threads()
    torch.set_num_threads(_threads_of(files) or threads)  # another number would add in another order
    checks = {
        "files": _check_files,
        "predictions": _check_predictions,
        "evaluation": _check_evaluation,
        "resume": _check_resume,
        "merge": _check_merge,
    }
    try:
        for name, check in checks.items():
            say(f"Checking {name} ...")
            try:
                verdict, words = "pass", check(files, say)
            except _Skipped as reason:
                verdict, words = "skipped", f"{reason}"
            except (FinetuneError, OSError) as error:
                verdict, words = "fail", " ".join(f"{error}".split())
            points.append({"point": name, "verdict": verdict, "words": words})
    finally:
        torch.set_num_threads(threads)
    verdict = "pass" if files.finished else "unfinished"
    if any(point["verdict"] == "fail" for point in points):
        verdict = "fail"
    return {"run": str(path), "verdict": verdict, "points": points}


def _threads_of(files: RunFolder) -> int | None:
    """Return the run's number of threads, if its result says a plausible one."""
    try:
        threads = files.read_result().get("threads")
    except ConfigError:
        return None
    if isinstance(threads, int) and 0 < threads < 1024:
        return threads
    return None


def _read_config(files: RunFolder) -> Config:
    """Read the frozen configuration."""
    return load([], None, files.config)


def _read_finished(files: RunFolder) -> dict[str, Any]:
    """Return the result of a finished run. Raises ``_Skipped`` if the run has not finished."""
    if not files.finished:
        raise _Skipped("the run has not finished")
    return files.read_result()


def _check_files(files: RunFolder, say: Say) -> str:
    """Check every hash, the frozen configuration against that of the change, and the lines of metrics."""
    safe.check_links(files.path)
    candidates = [files.delta, *(files.checkpoint(step) for step in files.steps())]
    folders = [folder for folder in candidates if folder.exists()]
    faults: list[str] = []
    for folder in folders:
        faults += manifest.faults(folder)
    if files.delta.exists() and not faults:
        files.check_unaltered(read_description(files.delta)["config"], files.delta)
    _read_config(files)
    if files.result.exists():
        result = files.read_result()
        if files.metrics.exists() and result.get("status") == "finished":
            faults += _faults_of_metrics(files.metrics, result["steps"])
    if faults:
        raise ConfigError("; ".join(faults))
    older = sum(not (folder / manifest.NAME).exists() for folder in folders)
    aside = f"; {older} older folders have no manifest, so only their layout was checked" if older else ""
    return (
        f"{len(folders) - older} folders have the sizes and SHA-256 of their manifests; "
        f"configuration and metrics fit them{aside}"
    )


def _faults_of_metrics(file: Path, steps: int) -> list[str]:
    """Return the faults of ``metrics.jsonl``, which must have a loss for every step, in order."""
    try:
        rows = [safe.parse_json(line) for line in safe.read_lines(file)]
        with_loss = [row["step"] for row in rows if "loss" in row]
        ordered = all(before["step"] <= after["step"] for before, after in itertools.pairwise(rows))
    except (ValueError, KeyError, TypeError) as error:
        return [f"{file} has a line that is damaged ({error})"]
    if ordered and with_loss == list(range(1, steps + 1)):
        return []
    return [f"{file} does not have one loss for each of {steps} steps, in order"]


def _check_predictions(files: RunFolder, say: Say) -> str:
    """Compute the test metrics of ``result.json`` from the stored predictions."""
    expected, rows = _read_finished(files)["metrics"]["test"], _read_predictions(files)
    if "bits_per_byte" in expected:
        key, loss = "bits_per_byte", math.fsum(row["loss"] for row in rows)
        found = loss / math.log(2) / sum(row["bytes"] for row in rows)
    else:
        key = "accuracy"
        found = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    if not math.isclose(found, expected[key], rel_tol=1e-12):
        raise ConfigError(
            f"{files.predictions} gives a test {key} of {found:.9g}, "
            f"and result.json says {expected[key]:.9g}."
        )
    return f"{len(rows)} rows give the test {key} {found:.6g} of result.json"


def _read_predictions(files: RunFolder) -> list[dict[str, Any]]:
    """Read the stored predictions, one row per example."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(files.predictions).to_pylist()
        return rows
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{files.predictions} cannot be read ({error}).") from error


def _check_evaluation(files: RunFolder, say: Say) -> str:
    """Evaluate the stored change again: it must give the metrics of ``result.json``."""
    result = _read_finished(files)
    expected, found = result["metrics"], evaluate(files.path)["metrics"]
    wrong = []
    for split, metrics in found.items():
        if metrics != expected.get(split):
            wrong.append(f"{split}: {_describe_difference(expected.get(split), metrics)}")
    if wrong:
        raise RunFailed(
            f"evaluated again, the stored change gives other numbers ({'; '.join(wrong)})"
            f"{_changed_versions(result)}"
        )
    return f"the stored change gives the metrics of {', '.join(found)} again, to the bit"


def _describe_difference(before: Any, after: Mapping[str, float]) -> str:
    """Name the metrics that differ, with both values."""
    known = before if isinstance(before, Mapping) else {}
    differing = []
    for key, value in after.items():
        if known.get(key) != value:
            differing.append(f"{key} {known.get(key)} before, {value} now")
    return ", ".join(differing)


def _changed_versions(result: Mapping[str, Any]) -> str:
    """Name the installed versions that differ from the run's, as an addition to a message."""
    before = result.get("versions") or {}
    changed = []
    for name, version in versions().items():
        if before.get(name) != version:
            changed.append(f"{name} {before.get(name)} then and {version} now")
    if not changed:
        return ""
    return f"; {', '.join(changed)}"


def _check_resume(files: RunFolder, say: Say) -> str:
    """Train again from a checkpoint in the middle: it must end like the run itself."""
    result, config = _read_finished(files), _read_config(files)
    if result["steps"] < config.train.steps and config.train.max_seconds:
        raise _Skipped(
            f"cannot be repeated: train.max_seconds={config.train.max_seconds} stopped the run after "
            f"{result['steps']} steps, and timing is not reproducible"
        )
    if result.get("processes", 1) > 1:
        raise _Skipped(f"the run had {result['processes']} processes, and this is one")
    start = _middle_checkpoint(files, result["steps"])
    if start is None:
        span = f"from the beginning, as no checkpoint of its middle is kept, to step {result['steps']}"
    else:
        span = f"from step {start} to step {result['steps']}"
    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as scratch:
        repeated = RunFolder(Path(scratch) / "run")
        say(f"Training {span} in {repeated.path} ...")
        _train_from(start, files, repeated, config)
        differences = _differences(files, repeated)
    if differences:
        raise RunFailed(
            f"the run {span} did not end the same: {'; '.join(differences)}{_changed_versions(result)}"
        )
    return f"the run {span} ends with the same change, metrics, predictions and result, to the bit"


def _middle_checkpoint(files: RunFolder, steps: int) -> int | None:
    """Return the step of the undamaged checkpoint closest to the middle of the run, if there is one."""
    whole = []
    for step in files.steps():
        if 0 < step < steps and not manifest.faults(files.checkpoint(step)):
            whole.append(step)
    return min(whole, key=lambda step: abs(2 * step - steps), default=None)


def _train_from(start: int | None, files: RunFolder, repeated: RunFolder, config: Config) -> None:
    """Copy the run as it was at a checkpoint to a new folder, and train it to the end there.

    Nothing is sent to W&B a second time.
    """
    from ..training.run import train

    repeated.path.mkdir()
    if start is not None:
        for source in (files.metrics, files.delta, files.checkpoint(start)):
            _copy(source, repeated.path / source.relative_to(files.path))
    shutil.copyfile(files.config, repeated.config)
    if config.logger.name == "wandb":
        config = replace(config, logger=LoggerConfig())
    train(config, repeated.path, lambda line: None, lambda done, steps, words: None)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, if it exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copyfile(source, target)


def _differences(files: RunFolder, repeated: RunFolder) -> list[str]:
    """Say what differs between two finished runs."""
    before, after = files.read_result(), repeated.read_result()
    found = []
    for key in REPEATED:
        if key in before and before[key] != after.get(key):
            found.append(f"{key} of result.json was {_short(before[key])} and is {_short(after.get(key))}")
    first = read_tensors(files.delta / "delta.safetensors")
    second = read_tensors(repeated.delta / "delta.safetensors")
    changed = [name for name in sorted({*first, *second}) if not _equal(first.get(name), second.get(name))]
    if changed:
        found.append(f"{len(changed)} of {len(first)} stored tensors differ (first: {changed[0]})")
    if _metrics_without_time(files) != _metrics_without_time(repeated):
        found.append("metrics.jsonl differs")
    if _read_predictions(files) != _read_predictions(repeated):
        found.append("the predictions differ")
    return found


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Tell whether both tensors exist and are the same to the bit."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _metrics_without_time(files: RunFolder) -> list[dict[str, Any]]:
    """Return the lines of metrics without the seconds of each step."""
    if not files.metrics.exists():
        return []
    rows = []
    for line in files.metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row.pop("seconds", None)
        rows.append(row)
    return rows


def _short(value: Any) -> str:
    """Return a value as JSON, truncated to 120 characters."""
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_merge(files: RunFolder, say: Say) -> str:
    """Merge the run: the merged folder, read back, must give the logits of base and change."""
    _read_finished(files)
    method = _read_config(files).method
    if not method.mergeable:
        raise _Skipped(f"method={method.name} cannot be merged: it changes more than weights")
    from ..core.attach import NotMergeable
    from .merge import merge

    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as scratch:
        try:
            found = merge(files.path, Path(scratch) / "merged")
        except NotMergeable as error:
            raise _Skipped(str(error)) from None
    difference, same = found["largest_logit_difference"], found["same_predictions"]
    return (
        f"the merged folder's logits are within {difference:.3g} of the run's, and {same:.2%} of its answers "
        "the same"
    )
