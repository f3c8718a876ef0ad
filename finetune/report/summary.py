"""Summarise a run's result in plain words, when the run ends."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import make_printable
from .metric import main_metric, show_bytes, show_share

MEMORY_KINDS = {"process_rss": "whole process", "cuda_allocated": "allocated on the GPU"}
QUOTED = "= ,'\"()[]{}"  # characters that the shell or the grammar of overrides would read otherwise
Result = Mapping[str, Any]  # the content of result.json


def describe_result(result: Result, folder: Path) -> str:
    """Return the facts of ``result``, one on each line, the run's folder, and commands to try next."""
    lines = [_write_heading(result), ""]
    for name, words in (*_list_facts(result), ("everything in", folder)):
        lines.append(f"  {name:<15}{words}")
    return "\n".join([*lines, "", *_suggest_next(result, folder)])


def _write_heading(result: Result) -> str:
    method, dataset = (
        make_printable(str(result.get("method", "?"))),
        make_printable(str(result.get("dataset", "?"))),
    )
    model, seed = make_printable(str(result.get("model", "?"))), make_printable(str(result.get("seed", "?")))
    objective = make_printable(str(result.get("objective", "task")))
    run = f"{method} on {dataset} with {model}, "
    if objective != "task":
        run += f"objective {objective}, "
    run += f"seed {seed}"
    steps = f"{result.get('steps', 0):,} steps"
    if result["status"] != "finished":
        error = make_printable(result.get("error") or "no reason recorded")
        return f"{run}: {make_printable(result['status'])} after {steps}: {error}"
    if result.get("best_step") is not None:
        steps += f", best on validation at step {result['best_step']}"
    return f"{run}: finished after {steps}."


def _list_facts(result: Result) -> Iterator[tuple[str, str]]:
    """Yield the name and the words of every fact that the result has; a failed run may have none."""
    yield from _list_metrics(result.get("metrics") or {})
    for name in ("suspect", "warnings"):
        for line in result.get(name) or []:
            yield name, make_printable(line)
    params = result.get("params")
    if params and params.get("total"):
        share = f"{100 * params['trained'] / params['total']:.3g} %"
        yield "trained", f"{params['trained']:,} of {params['total']:,} parameters ({share})"
    if result.get("changed") is not None:
        yield "changed", f"{show_share(result['changed'])} of the adapted entries"
    if result.get("zeros") is not None:
        yield "zeros", f"{show_share(result['zeros'])} of the entries of pruned layers, which stay 0"
    stored = result.get("stored_bytes")
    if stored is not None:
        yield "stored change", f"{stored:,} bytes ({show_bytes(stored)})"
    cost = result.get("cost")
    if cost and {"peak_memory_kind", "peak_memory_bytes", "train_seconds"} <= cost.keys():
        kind = make_printable(cost["peak_memory_kind"])
        yield "peak memory", f"{show_bytes(cost['peak_memory_bytes'])} ({MEMORY_KINDS.get(kind, kind)})"
        training = f"{cost['train_seconds']:.1f} seconds of training"
        step = cost.get("step_seconds_median")
        yield "time", training if step is None else f"{step:.3g} seconds per step, {training}"


def _list_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the main metric before and after training, on the test set and on the retention set."""
    for split, base_split, where in (
        ("test", "base", "on the test set"),
        ("retention", "base_retention", "on what it should not forget"),
    ):
        after, before = metrics.get(split), metrics.get(base_split) or {}
        metric = main_metric(after)
        if not after or not metric:
            continue
        words = f"{metric.show(after[metric.key])} after ({metric.words} {where})"
        if before.get(metric.key) is not None:
            words = f"{metric.show(before[metric.key])} before, {words}"
        yield "retention" if split == "retention" else metric.words, words


def _suggest_next(result: Result, folder: Path) -> list[str]:
    if result["status"] != "finished":
        return [f"See {folder / 'log.txt'} for what happened; the same command starts it again."]
    run = f"ckpt={folder}"
    if any(char in str(folder) for char in QUOTED):
        run = f"--ckpt {shlex.quote(str(folder))}"
    from ..config import plugins

    options = plugins.words()
    lines = [f"Next: finetune eval {run}{options}"]
    method = registry.catalog("method").get(str(result.get("method")))
    if method is None or method.facts.get("mergeable", True):
        lines.append(f"      finetune merge {run} out=merged{options}")
    return lines
