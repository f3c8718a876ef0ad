"""Put together the content of ``result.json``, and record machine and software in it. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..config import plugin_records
from ..config.settings import Config
from ..system import safe
from ..system.version import __version__
from .atomic import to_json_value

RECORDED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "numpy",
    "safetensors",
    "tokenizers",
    "wandb",
)


METRICS = (type(None), {str: float | None})
RESULT_SCHEMA = {  # what readers of ``result.json`` rely on; a failed run has less
    "status": str,
    "error?": str | None,
    "method?": str,
    "model?": str,
    "dataset?": str,
    "objective?": str,
    "seed?": int,
    "steps?": int,
    "best_step?": int | None,
    "metrics?": {str: METRICS},
    "params?": (type(None), {"trained": int, "adapted?": int, "total?": int}),
    "changed?": float | None,
    "zeros?": float | None,
    "stored_bytes?": int | None,
    "cost?": (
        type(None),
        {
            "step_seconds_median?": float | None,
            "train_seconds?": float,
            "peak_memory_bytes?": int,
            "peak_memory_kind?": str,
        },
    ),
    "versions?": {str: str},
    "git_commit?": str | None,
    "device?": str | None,
    "config_hash?": str,
    "group_hash?": str,
    "suspect?": [str],
    "references?": {str: str},
    "selected_steps?": {str: int},
    "warnings?": [str],
}


class Params(TypedDict):
    """Counts of entries: those that the optimizer updates, those of the model that it can change, and all."""

    trained: int
    adapted: int
    total: int


class Cost(TypedDict):
    """The cost of training, in seconds and bytes."""

    step_seconds_median: float | None
    train_seconds: float
    peak_memory_bytes: int
    peak_memory_kind: str


def group_hash(config: Config) -> str:
    """Return ten hex digits that runs share if they differ in nothing but the seed."""
    return dataclasses.replace(config, seed=0).hash()


def make_result(
    config: Config,
    *,
    status: Literal["finished", "failed"],
    error: str | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    params: Params | None = None,
    changed: float | None = None,
    zeros: float | None = None,
    stored_bytes: int | None = None,
    cost: Cost | None = None,
    steps: int = 0,
    best_step: int | None = None,
    device: str | None = None,
    suspect: Sequence[str] = (),
    warnings: Sequence[str] = (),
    batch: Mapping[str, Any] | None = None,
    processes: int | None = None,
    threads: int | None = None,
    references: Mapping[str, str] | None = None,
    selected_steps: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the content of ``result.json``; docs/run-folder.md says what each key means."""
    streams = {name: dataset.name for name, dataset in config.streams.items()}
    return {
        "format": safe.FORMAT,
        "status": status,
        "error": error,
        "method": config.method.name,
        "model": config.model.name,
        "model_path": config.model.path,
        "dataset": config.dataset.name,
        **({"streams": streams} if streams else {}),
        "objective": config.objective.name,
        "seed": config.seed,
        "metrics": to_json_value(metrics or {}),
        "params": params,
        "changed": changed,
        **({} if zeros is None else {"zeros": zeros}),
        "stored_bytes": stored_bytes,
        "cost": cost,
        "steps": steps,
        "best_step": best_step,
        "device": device,
        "suspect": list(suspect),
        "warnings": list(warnings),
        "batch": batch,
        "processes": processes,
        "threads": threads,
        "versions": versions(),
        **({"references": dict(references)} if references else {}),
        **({"selected_steps": dict(selected_steps)} if selected_steps else {}),
        **plugin_records.record_of(config),
        "git_commit": git_commit(),
        "config_hash": config.hash(),
        "group_hash": group_hash(config),
    }


def peak_memory(cuda_bytes: int | None = None) -> tuple[int, str]:
    """Return the peak memory in bytes, and its kind.

    The kind is ``cuda_allocated`` if the caller measured ``cuda_bytes``, else ``process_rss``: the largest
    resident memory of this process since it started.
    """
    if cuda_bytes is not None:
        return cuda_bytes, "cuda_allocated"
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage would start from the peak of the parent process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "process_rss"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process_rss"


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python, and of the installed packages that decide numbers."""
    found = {"finetune": __version__, "python": platform.python_version()}
    for name in RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, once per process.

    ``-dirty`` is added if tracked files differ. None when the package was installed from a wheel.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
