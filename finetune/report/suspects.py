"""Runs that should not be trusted: those that found fault with themselves, and different methods that gave the very same answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from ..system import safe
from .rows import plain
from .runs import Run


def of(runs: Sequence[Run]) -> Iterator[str]:
    """One sentence a note."""
    for run in runs:
        told = run.result.get("suspect")
        yield from (
            (f"{run.path} is suspect: {reason}." for reason in told if isinstance(reason, str))
            if isinstance(told, list)
            else ()
        )
    for same in _identical(runs):
        names = ", ".join(str(run.path) for run in same[:4]) + (
            f" and {len(same) - 4} more" if len(same) > 4 else ""
        )
        yield f"{names}: settings of the method differ and every prediction is the same to the bit, so one of them may have had no effect."


def _identical(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs of one seed whose methods are set differently and whose predictions are the same file."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run.status == "finished" and run.known and (mark := _mark(run)):
            groups.setdefault((run.seed, mark), []).append(run)
    return [same for same in groups.values() if len({_method(run) for run in same}) > 1]


def _method(run: Run) -> str:
    return plain(
        {key: value for key, value in run.settings.items() if key.partition(".")[0] in ("method", "selector")}
    )


def _mark(run: Run) -> str:
    """SHA-256 of the predictions, with their scores or losses in full; empty where there are none."""
    try:
        return hashlib.sha256(safe.read(run.path / "predictions.parquet", 2**30)).hexdigest()
    except (OSError, ValueError):
        return ""
