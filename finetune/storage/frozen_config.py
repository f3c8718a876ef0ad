"""Compare the frozen configuration of a run with another one. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..config import later
from ..config.settings import decides
from ..system import safe

SHOWN = 5
# Settings that say where things lie and what computes: they may differ where a run is only read.
MOVABLE = (
    *("model.path", "model.download", "model.revision", "dataset.path"),
    *("train.device", "train.threads", "train.workers", "train.eval_batch_size"),
)


def describe_differences(file: Path, other: dict[str, Any], free: tuple[str, ...] = ()) -> str:
    """Name the first five settings in which a frozen configuration differs from ``other``, with both values.

    Empty if both belong to the same run. Settings that cannot change the result, and those named in ``free``,
    may differ.
    """
    try:
        frozen = safe.read_yaml(file)
    except (OSError, ValueError, yaml.YAMLError):
        return "its config.yaml cannot be read"
    there, here = _deciding_settings(frozen, free), _deciding_settings(other, free)
    differences = []
    for key in {**there, **here}:
        values = there.get(key, "absent"), here.get(key, "absent")
        if values[0] != values[1]:
            differences.append(f"{key} is {values[0]} there and {values[1]} here")
    words = ", ".join(differences[:SHOWN])
    if len(differences) > SHOWN:
        words += f" and {len(differences) - SHOWN} more"
    return words


def _deciding_settings(tree: Any, free: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings that can change a result, by dotted key; fill in those that an old file lacks."""
    settings = {}
    for key, value in _flatten(later.enter(tree) if isinstance(tree, dict) else tree).items():
        if decides(key) and _as_of_dataset(key) not in free:
            settings[key] = value
    return settings


def _as_of_dataset(key: str) -> str:
    """Return ``dataset.path`` for ``streams.retain.path``, and any other key as it is."""
    section, *names = key.split(".")
    return ".".join(["dataset", *names[1:]]) if section == "streams" and len(names) > 1 else key


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    values: dict[str, Any] = {}
    for name, item in tree.items():
        values |= _flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return values
