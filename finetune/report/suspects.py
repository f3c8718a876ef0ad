"""Find runs that should not be trusted.

These are runs that recorded a suspicion themselves, and runs whose methods differ but whose predictions do
not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from ..system import safe
from .readable import show_some
from .rows import encode_value
from .runs import Run

LISTED = 4  # runs that a note names


def describe_suspects(runs: Sequence[Run]) -> Iterator[str]:
    """Yield one sentence for each suspicion."""
    for run in runs:
        reasons = run.result.get("suspect")
        if not isinstance(reasons, list):
            continue
        for reason in reasons:
            if isinstance(reason, str):
                yield f"{run.path} is suspect: {reason}."
    for group in _find_identical(runs):
        names = [str(run.path) for run in group]
        yield (
            f"{show_some(names, LISTED)}: the methods have different settings, "
            "but their predictions are identical to the bit. A setting may have had no effect."
        )


def _find_identical(runs: Sequence[Run]) -> list[list[Run]]:
    """Return groups of runs with one seed, identical predictions and different settings of the method."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run.status != "finished" or not run.settings_complete:
            continue
        digest = _hash_predictions(run)
        if digest:
            groups.setdefault((run.seed, digest), []).append(run)
    found = []
    for group in groups.values():
        if len({_encode_method(run) for run in group}) > 1:
            found.append(group)
    return found


def _encode_method(run: Run) -> str:
    settings = {}
    for key, value in run.settings.items():
        if key.partition(".")[0] in ("method", "selector"):
            settings[key] = value
    return encode_value(settings)


def _hash_predictions(run: Run) -> str:
    """Return the SHA-256 of the predictions file, which has full scores or losses; empty if there is none."""
    try:
        return hashlib.sha256(safe.read(run.path / "predictions.parquet", 2**30)).hexdigest()
    except (OSError, ValueError):
        return ""
