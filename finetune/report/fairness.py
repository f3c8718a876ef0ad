"""What differs between the rows of a comparison besides what is compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from .rows import REPEATS, Row, name, shown, tuned, varying
from .runs import LOST

KINDS = {
    "train.precision": "precision", "model.dtype": "precision", "train.device": "hardware", "train.threads": "hardware",
    "train.batch_size": "data order", "dataset.split_seed": "data order", "dataset.fold": "data order",
}  # fmt: skip
TOLERANCE = 1.02  # trained counts within 2 % are equal, as budget= makes them
LISTED = 4  # rows that a sentence names for one value
Finding = dict[str, Any]


def check(rows: Sequence[Row], keys: Sequence[str]) -> list[Finding]:
    """Every finding; ``keys`` are the settings that are compared. Rows without any finished run are only looked at for their settings."""
    done = [row for row in rows if row.finished]
    if len(rows) < 2:
        return list(_failures(rows))
    findings = [
        *_settings(rows, keys),
        *_weights(done, keys),
        *_trained(done),
        *_trials(rows),
        *_steps(done),
        *_seeds(done),
    ]
    return [*findings, *_software(done), *_hardware(done), *_failures(rows)]


def finding(kind: str, what: str, values: dict[str, str], words: str) -> Finding:
    """As the comparison's data hold it."""
    return {"kind": kind, "what": what, "values": values, "words": words}


def _settings(rows: Sequence[Row], keys: Sequence[str]) -> Iterator[Finding]:
    """Settings in which rows differ: neither compared, nor of the part that is, nor tuned for every row with as many trials."""
    parts = tuple(f"{key.removesuffix('name')}" for key in keys if key.endswith(".name"))
    fair = _fairly_tuned(rows)
    for key in varying(run.settings for row in rows for run in row.runs if run.known):
        if key in keys or key in fair or key.startswith(parts):
            continue
        values = {
            row.label: ", ".join(shown(value) for value in row.values(key))
            for row in rows
            if any(run.known for run in row.runs)
        }
        if len(set(values.values())) > 1:
            kind = KINDS.get(key, "setting")
            effect = (
                ", so equal seeds see other batches" if kind == "data order" and key not in REPEATS else ""
            )
            yield finding(kind, key, values, f"{name(key)} differs{effect}: {listed(values)}.")


def _fairly_tuned(rows: Sequence[Row]) -> set[str]:
    runs = [run for row in rows for run in row.runs if run.status == "finished"]
    counts = {(run.tuning["parameter"], run.tuning.get("trials")) if run.tuning else None for run in runs}
    return tuned(runs) if len(counts) == 1 else set()


def listed(values: dict[str, str]) -> str:
    """``16 (lora), 32 (snell, sara)``."""
    groups: dict[str, list[str]] = {}
    for row, value in values.items():
        groups.setdefault(value, []).append(row)
    parts = []
    for value, members in groups.items():
        more = f" and {len(members) - LISTED} more" if len(members) > LISTED else ""
        parts.append(f"{value} ({', '.join(members[:LISTED])}{more})")
    return ", ".join(parts)


def _differ(kind: str, what: str, values: dict[str, str], words: str) -> Iterator[Finding]:
    """A finding where the values are not all the same."""
    if len(set(values.values())) > 1:
        yield finding(kind, what, values, f"{words}: {listed(values)}.")


def _told(row: Row, key: str) -> str:
    """The different texts that the row's results hold for ``key``."""
    return ", ".join(sorted({run.text(key) or "unknown" for run in row.finished}))


def _weights(rows: Sequence[Row], keys: Sequence[str]) -> Iterator[Finding]:
    if "model.name" in keys or "model.path" in keys:
        return
    known = {row.label: base[:10] for row in rows if (base := row.finished[0].base)}
    yield from _differ("setting", "base weights", known, "The models started from different weights")


def _trained(rows: Sequence[Row]) -> Iterator[Finding]:
    counts = {
        row.label: [n for run in row.finished if (n := run.number("params.trained")) is not None]
        for row in rows
    }
    low = min((min(found) for found in counts.values() if found), default=0)
    high = max((max(found) for found in counts.values() if found), default=0)
    if high > TOLERANCE * low:
        values = {
            row: " to ".join(f"{n:,.0f}" for n in sorted({min(found), max(found)})) if found else "unknown"
            for row, found in counts.items()
        }
        factor = f"by a factor of {high / low:.3g}" if low else "from none"
        words = f"Trained parameters differ {factor}, from {low:,.0f} to {high:,.0f}; `finetune sweep budget=...` gives every method as many."
        yield finding("trained", "trained parameters", values, words)


def _trials(rows: Sequence[Row]) -> Iterator[Finding]:
    values = {
        row.label: ", ".join(sorted({_trial(run.tuning) for run in row.runs if run.status == "finished"}))
        for row in rows
        if row.finished
    }
    yield from _differ("trials", "tuning trials", values, "Settings were not tuned with as many trials")


def _trial(tuning: Any) -> str:
    return f"{tuning.get('trials')} trials of {tuning['parameter']}" if tuning else "none"


def _steps(rows: Sequence[Row]) -> Iterator[Finding]:
    """Runs that ended before their ``train.steps``."""
    short = {}
    for row in rows:
        for run in row.finished:
            done, asked = run.number("steps"), run.settings.get("train.steps")
            if done is not None and isinstance(asked, int) and done < asked:
                short[row.label] = f"{done:.0f} of {asked} steps"
    if short:
        values = {row.label: short.get(row.label, "all steps") for row in rows}
        yield finding("setting", "steps done", values, f"Runs ended before their last step: {listed(short)}.")


def _seeds(rows: Sequence[Row]) -> Iterator[Finding]:
    values = {
        row.label: ", ".join(shown(seed) for seed in dict.fromkeys(run.seed for run in row.finished))
        for row in rows
    }
    yield from _differ("seeds", "seeds", values, "Rows were repeated with different seeds")


def _software(rows: Sequence[Row]) -> Iterator[Finding]:
    names: dict[str, None] = {}
    for row in rows:
        for run in row.finished:
            found = run.result.get("versions")
            names |= dict.fromkeys(found if isinstance(found, dict) else ())
    for package in names:
        values = {row.label: _version(row, package) for row in rows}
        yield from _differ("versions", package, values, f"Runs used different versions of {package}")
    commits = {
        row.label: re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", _told(row, "git_commit")) for row in rows
    }
    yield from _differ("versions", "commit", commits, "Runs used different commits of finetune")


def _version(row: Row, package: str) -> str:
    found = (run.result.get("versions") for run in row.finished)
    return ", ".join(
        sorted(
            {
                str(versions.get(package, "absent")) if isinstance(versions, dict) else "unknown"
                for versions in found
            }
        )
    )


def _hardware(rows: Sequence[Row]) -> Iterator[Finding]:
    yield from _differ(
        "hardware", "device", {row.label: _told(row, "device") for row in rows}, "Runs used different devices"
    )
    threads = {
        row.label: ", ".join(sorted({f"{run.number('threads') or 'unknown'}" for run in row.finished}))
        for row in rows
    }
    yield from _differ("hardware", "threads", threads, "Runs used different numbers of threads")
    kinds = {row.label: _told(row, "cost.peak_memory_kind") for row in rows}
    yield from _differ("hardware", "memory measured as", kinds, "Peak memory was not measured alike")


def _failures(rows: Sequence[Row]) -> Iterator[Finding]:
    bad = {row.label: [run for run in row.runs if run.status != "finished"] for row in rows}
    values = {row: _count(runs) for row, runs in bad.items() if runs}
    if values:
        words = f"Not every run has finished, so means are over those that did: {listed(values)}."
        yield finding("failures", "runs without a result", values, words)


def _count(runs: Sequence[Any]) -> str:
    counts = {status: sum(run.status == status for run in runs) for status in LOST}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)
