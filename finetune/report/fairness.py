"""Find what differs between the rows of a comparison besides the compared settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from .metric import show_share
from .readable import show_some
from .rows import REPEATS, Row, find_tuned, find_varying, short_name, show_value
from .runs import NO_RESULT, Run, get_numbers
from .schema import Finding

KINDS = {
    "train.precision": "precision",
    "model.dtype": "precision",
    "train.device": "hardware",
    "train.threads": "hardware",
    "train.batch_size": "data order",
    "dataset.split_seed": "data order",
    "dataset.fold": "data order",
}  # the kind of a finding about this setting; "setting" for all others
TOLERANCE = 1.02  # trained counts within 2 % count as equal: budget= cannot meet them more closely
LISTED = 4  # the most rows that a sentence names for one value


def check_fairness(rows: Sequence[Row], keys: Sequence[str]) -> list[Finding]:
    """Return every finding. ``keys`` are the compared settings.

    Rows without a finished run take part only in the checks of settings and of failures.
    """
    if len(rows) < 2:
        return list(_check_failures(rows))
    done = [row for row in rows if row.finished]
    return [
        *_check_settings(rows, keys),
        *_check_base_weights(done, keys),
        *_check_teachers(done),
        *_check_trained(done),
        *_check_changed(done),
        *_compare_runs(
            "trials",
            "tuning trials",
            done,
            _describe_tuning,
            "Settings were tuned with different numbers of trials",
        ),
        *_check_steps(done),
        *_check_seeds(done),
        *_check_software(done),
        *_check_hardware(done),
        *_check_failures(rows),
    ]


def make_finding(kind: str, what: str, values: dict[str, str], words: str) -> Finding:
    """Return a finding as ``Comparison.as_dict()`` holds it; ``values`` maps row labels to texts."""
    return {"kind": kind, "what": what, "values": values, "words": words}


def list_values(values: Mapping[str, str]) -> str:
    """Return rows grouped by their value, such as ``16 (lora), 32 (snell, sara)``."""
    groups: dict[str, list[str]] = {}
    for label, value in values.items():
        groups.setdefault(value, []).append(label)
    parts = [f"{value} ({show_some(labels, LISTED)})" for value, labels in groups.items()]
    return ", ".join(parts)


def _compare_values(kind: str, what: str, values: dict[str, str], words: str) -> Iterator[Finding]:
    """Yield a finding if the values of the rows are not all equal."""
    if len(set(values.values())) > 1:
        yield make_finding(kind, what, values, f"{words}: {list_values(values)}.")


def _compare_runs(
    kind: str, what: str, rows: Sequence[Row], describe: Callable[[Run], str], words: str
) -> Iterator[Finding]:
    """Describe the finished runs of each row, and yield a finding if the rows differ."""
    values = {}
    for row in rows:
        texts = set(map(describe, row.finished))
        values[row.label] = ", ".join(sorted(texts))
    yield from _compare_values(kind, what, values, words)


def _check_settings(rows: Sequence[Row], keys: Sequence[str]) -> Iterator[Finding]:
    """Compare all settings but those in which rows may differ.

    These are the compared ones, the settings of a compared part (``method.*`` if methods are compared), and a
    setting that was tuned with equally many trials for every row.
    """
    compared_parts = tuple(key.removesuffix("name") for key in keys if key.endswith(".name"))
    fairly_tuned = _find_fairly_tuned(rows)
    known = [row for row in rows if row.known_settings]
    for key in find_varying(settings for row in known for settings in row.known_settings):
        if key in keys or key in fairly_tuned or key.startswith(compared_parts):
            continue
        values = {row.label: ", ".join(row.show_values(key)) for row in known}
        kind = KINDS.get(key, "setting")
        effect = ""
        if kind == "data order" and key not in REPEATS:
            effect = ", so runs with the same seed see different batches"
        yield from _compare_values(kind, key, values, f"{short_name(key)} differs{effect}")


def _find_fairly_tuned(rows: Sequence[Row]) -> set[str]:
    """Return the tuned settings if all finished runs tuned the same setting with equally many trials."""
    runs: list[Run] = []
    for row in rows:
        runs += row.finished
    if len(set(map(_describe_tuning, runs))) > 1:
        return set()
    return find_tuned(runs)


def _check_base_weights(rows: Sequence[Row], keys: Sequence[str]) -> Iterator[Finding]:
    if {"model.name", "model.path", "model.head"} & set(keys):  # a kept head is part of the weights
        return
    values = {}
    for row in rows:
        fingerprint = row.finished[0].base_fingerprint
        if fingerprint:
            values[row.label] = fingerprint[:10]
    yield from _compare_values("setting", "base weights", values, "The models started from different weights")


def _check_teachers(rows: Sequence[Row]) -> Iterator[Finding]:
    """Compare, for each path of a reference model, the weights that the rows' objectives used."""
    marks: dict[str, dict[str, str]] = {}
    for row in rows:
        for path, mark in (row.finished[0].result.get("references") or {}).items():
            marks.setdefault(path, {})[row.label] = str(mark)[:10]
    for path, values in marks.items():
        words = f"The teacher {path} had different weights"
        yield from _compare_values("setting", f"teacher {path}", values, words)


def _check_trained(rows: Sequence[Row]) -> Iterator[Finding]:
    values = {}
    all_counts: list[float] = []
    for row in rows:
        counts = get_numbers(row.finished, "params.trained")
        all_counts += counts
        values[row.label] = _show_range(counts)
    low, high = min(all_counts, default=0), max(all_counts, default=0)
    if high <= TOLERANCE * low:
        return
    factor = f"by a factor of {high / low:.3g}" if low else "from none"
    words = (
        f"Trained parameters differ {factor}, from {low:,.0f} to {high:,.0f}; "
        "`finetune sweep budget=...` gives all methods equal numbers."
    )
    yield make_finding("trained", "trained parameters", values, words)


def _check_changed(rows: Sequence[Row]) -> Iterator[Finding]:
    """Compare the shares of the adapted entries that differ at the end, where all runs have them.

    They can differ even if equally many entries are trained: entries that are no longer trained can keep
    their change, and a low-rank change reaches a whole matrix.
    """
    values = {}
    all_shares: list[float] = []
    for row in rows:
        shares = get_numbers(row.finished, "changed")
        if len(shares) < len(row.finished):
            return
        all_shares += shares
        texts = dict.fromkeys(map(show_share, (min(shares), max(shares))))
        values[row.label] = " to ".join(texts)
    if max(all_shares, default=0) > TOLERANCE * min(all_shares, default=0):
        words = f"The share of adapted entries that were changed by the end differs: {list_values(values)}."
        yield make_finding("trained", "changed entries", values, words)


def _show_range(counts: Sequence[float]) -> str:
    if not counts:
        return "unknown"
    low, high = f"{min(counts):,.0f}", f"{max(counts):,.0f}"
    if min(counts) == max(counts):
        return low
    return f"{low} to {high}"


def _describe_tuning(run: Run) -> str:
    if not run.tuning:
        return "none"
    return f"{run.tuning.get('trials')} trials of {run.tuning['parameter']}"


def _check_steps(rows: Sequence[Row]) -> Iterator[Finding]:
    """Find runs that ended before ``train.steps``."""
    short = {}
    for row in rows:
        for run in row.finished:
            done, wanted = run.get_number("steps"), run.settings.get("train.steps")
            if done is not None and isinstance(wanted, int) and done < wanted:
                short[row.label] = f"{done:.0f} of {wanted} steps"
    if short:
        values = {row.label: short.get(row.label, "all steps") for row in rows}
        words = f"Runs ended before their last step: {list_values(short)}."
        yield make_finding("setting", "steps done", values, words)


def _check_seeds(rows: Sequence[Row]) -> Iterator[Finding]:
    values = {}
    for row in rows:
        seeds = dict.fromkeys(show_value(run.seed) for run in row.finished)
        values[row.label] = ", ".join(seeds)
    yield from _compare_values("seeds", "seeds", values, "Rows were repeated with different seeds")


def _check_software(rows: Sequence[Row]) -> Iterator[Finding]:
    packages: dict[str, None] = {}
    for row in rows:
        for run in row.finished:
            versions = run.result.get("versions")
            if isinstance(versions, dict):
                packages |= dict.fromkeys(versions)
    for package in packages:
        describe = partial(_describe_version, package=package)
        words = f"Runs used different versions of {package}"
        yield from _compare_runs("versions", package, rows, describe, words)
    words = "Runs used different commits of finetune"
    yield from _compare_runs("versions", "commit", rows, _describe_commit, words)


def _describe_version(run: Run, package: str) -> str:
    versions = run.result.get("versions")
    if not isinstance(versions, dict):
        return "unknown"
    return str(versions.get(package, "absent"))


def _describe_commit(run: Run) -> str:
    """Return the commit with a short hash."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", _describe_text(run, "git_commit"))


def _check_hardware(rows: Sequence[Row]) -> Iterator[Finding]:
    describe = partial(_describe_text, name="device")
    yield from _compare_runs("hardware", "device", rows, describe, "Runs used different devices")
    words = "Runs used different numbers of threads"
    yield from _compare_runs("hardware", "threads", rows, _describe_threads, words)
    describe = partial(_describe_text, name="cost.peak_memory_kind")
    words = "Peak memory was measured in different ways"
    yield from _compare_runs("hardware", "memory measured as", rows, describe, words)


def _describe_text(run: Run, name: str) -> str:
    return run.get_text(name) or "unknown"


def _describe_threads(run: Run) -> str:
    return str(run.get_number("threads") or "unknown")


def _check_failures(rows: Sequence[Row]) -> Iterator[Finding]:
    values = {}
    for row in rows:
        counts = count_without_result(row.runs)
        parts = [f"{count} {status}" for status, count in counts.items() if count]
        if parts:
            values[row.label] = ", ".join(parts)
    if values:
        words = f"Some runs have not finished; means are over those that have: {list_values(values)}."
        yield make_finding("failures", "runs without a result", values, words)


def count_without_result(runs: Sequence[Run]) -> dict[str, int]:
    """Count the failed, pruned and unfinished runs."""
    counts = dict.fromkeys(NO_RESULT, 0)
    for run in runs:
        if run.status in counts:
            counts[run.status] += 1
    return counts
