"""A run's result in plain words."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import visible
from .metric import main_metric, show_bytes

KINDS = {"process_rss": "whole process", "cuda_allocated": "allocated on the GPU"}


def summary(result: Mapping[str, Any], folder: Path) -> str:
    """What ``result`` (the content of ``result.json``) says, one fact a line, with where it lies and a command to try next."""
    lines = [
        _head(result),
        "",
        *(f"  {name:<15}{words}" for name, words in _facts(result)),
        f"  {'everything in':<15}{folder}",
    ]
    return "\n".join([*lines, "", *_next(result, folder)])


def _head(result: Mapping[str, Any]) -> str:
    method, dataset, model, seed = (
        visible(str(result.get(key, "?"))) for key in ("method", "dataset", "model", "seed")
    )
    which, steps = f"{method} on {dataset} with {model}, seed {seed}", result.get("steps", 0)
    best = (
        f", best on validation at step {result['best_step']}" if result.get("best_step") is not None else ""
    )
    if result["status"] == "finished":
        return f"{which}: finished after {steps:,} steps{best}."
    return f"{which}: {visible(result['status'])} after {steps:,} steps: {visible(result.get('error') or 'no reason recorded')}"


def _facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and words of everything that the result holds; a failed run may hold none of it."""
    yield from _metrics(result.get("metrics") or {})
    yield from ((name, visible(line)) for name in ("suspect", "warnings") for line in result.get(name) or [])
    params, cost = result.get("params"), result.get("cost")
    if params and params.get("total"):
        yield (
            "trained",
            f"{params['trained']:,} of {params['total']:,} parameters ({100 * params['trained'] / params['total']:.3g} %)",
        )
    if result.get("stored_bytes") is not None:
        yield "stored change", f"{result['stored_bytes']:,} bytes ({show_bytes(result['stored_bytes'])})"
    if cost and {"peak_memory_kind", "peak_memory_bytes", "train_seconds"} <= cost.keys():
        kind = visible(cost["peak_memory_kind"])
        yield "peak memory", f"{show_bytes(cost['peak_memory_bytes'])} ({KINDS.get(kind, kind)})"
        step = cost.get("step_seconds_median")
        yield (
            "time",
            (f"{step:.3g} seconds per step, " if step is not None else "")
            + f"{cost['train_seconds']:.1f} seconds of training",
        )


def _metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The main metric on the test set and on what should not be forgotten, each before and after."""
    for split, before, where in (
        ("test", "base", "on the test set"),
        ("retention", "base_retention", "on what it should not forget"),
    ):
        after, base = metrics.get(split), metrics.get(before) or {}
        metric = main_metric(after)
        if after and metric:
            start = f"{metric.show(base[metric.key])} before, " if base.get(metric.key) is not None else ""
            yield (
                ("retention" if split == "retention" else metric.words),
                f"{start}{metric.show(after[metric.key])} after ({metric.words} {where})",
            )


def _next(result: Mapping[str, Any], folder: Path) -> list[str]:
    if result["status"] != "finished":
        return [f"See {folder / 'log.txt'} for what happened; the same command starts it again."]
    where = (
        f"--ckpt {shlex.quote(str(folder))}"
        if any(c in str(folder) for c in "= ,'\"()[]{}")
        else f"ckpt={folder}"
    )
    return [f"Next: finetune eval {where}", f"      finetune merge {where} out=merged"]
