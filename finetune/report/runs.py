"""Runs as their folders tell them, read quickly: whatever is missing or torn makes a run's failure and its reason, never an error."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..config import later
from ..config.settings import NOT_THE_RUN as WITHOUT_EFFECT
from ..errors import ConfigError
from ..system import safe

LOST = ("failed", "pruned", "unfinished")  # what becomes of a run that has no result; a search prunes
DEPTH = 4  # how far below a given folder runs are looked for: outputs/NAME/RUN is two
NO_ROWS = {"trials", "wandb", "checkpoints", "inspect", "delta"}
NOT_THE_RUN = (*WITHOUT_EFFECT, "seed")  # settings that make no other experiment
OF_A_RUN = (
    "result.json",
    "config.yaml",
    "delta",
    "delta/delta.json",
    "metrics.jsonl",
    "predictions.parquet",
    "tuning.json",
)
LOSS = re.compile(r'"loss": (-?[\d.]+(?:e[-+]?\d+)?)\b')
Settings = dict[str, Any]


@dataclass
class Run:
    """One run folder. ``settings``: its frozen configuration as dotted keys, without what makes no other experiment."""

    path: Path
    status: Literal["finished", "failed", "pruned", "unfinished"]
    error: str | None
    result: Mapping[str, Any]
    settings: Settings
    seed: int | None
    tuning: Mapping[str, Any] | None = None
    known: bool = True  # whether ``settings`` is the whole configuration
    notes: list[str] = field(default_factory=list)

    def number(self, name: str) -> float | None:
        """A number of the result by its dotted name, such as ``test.accuracy`` or ``cost.peak_memory_bytes``."""
        metrics = self.result.get("metrics")
        found = _at(metrics, name)
        found = found if found is not None else _at(self.result, name)
        good = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        return found if good else None

    def text(self, name: str) -> str | None:
        """A text of the result by its dotted name."""
        found = _at(self.result, name)
        return found if isinstance(found, str) else None

    @cached_property
    def base(self) -> str | None:
        """The fingerprint of the weights that it started from."""
        about = _json(self.path / "delta" / "delta.json")
        found = about.get("base_fingerprint") if isinstance(about, dict) else None
        return found if isinstance(found, str) else None

    def curve(self, key: str) -> list[tuple[int, float, float | None]]:
        """Step, value of ``val_<key>``, and the training loss averaged since the validation before; what is torn is left out."""
        return list(_curve(safe.read_lines(self.path / "metrics.jsonl"), f"val_{key}"))


def _curve(lines: Iterable[str], key: str) -> Iterator[tuple[int, float, float | None]]:
    losses: list[float] = []
    for line in lines:
        if f'"{key}"' not in line:
            losses += [float(x) for x in LOSS.findall(line)]
            continue
        try:
            found = json.loads(line)
            step, value = int(found["step"]), float(found[key])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if not math.isfinite(value):
            continue
        yield step, value, math.fsum(losses) / len(losses) if losses else None
        losses = []


def find(folders: Iterable[Path]) -> list[Path]:
    """The run folders in and below ``folders``, each once. Raises ``ConfigError`` with every folder that is missing or holds none."""
    found: dict[Path, Path] = {}
    faults = []
    for folder in folders:
        if not folder.is_dir():
            faults.append(
                f"{folder}: there is no such folder. Give a run, a sweep's folder (outputs/NAME), or several of them."
            )
            continue
        runs = sorted(_below(folder, 0))
        if not runs:
            faults.append(
                f"{folder} holds no run: no folder in it has a config.yaml or result.json. Give outputs/NAME of a sweep."
            )
        for path in runs:
            found.setdefault(path.resolve(), path)
    if faults:
        raise ConfigError(*faults)
    return list(found.values())


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inside = {entry.name: entry.is_dir() for entry in _entries(folder)}
    except OSError:
        return
    if inside.get("config.yaml") is False or inside.get("result.json") is False:
        yield folder
    elif depth < DEPTH:
        for name, is_folder in inside.items():
            if is_folder and name not in NO_ROWS and not name.startswith("."):
                yield from _below(
                    folder / name, DEPTH if (folder / name).is_symlink() else depth + 1
                )  # a link to a run, but not to a whole disk


def _entries(folder: Path) -> list[Any]:
    with os.scandir(folder) as entries:
        return list(entries)


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs at ``paths``, without those that repeat another's configuration; of such, a finished one stays."""
    shared: dict[str, Settings] = {}
    runs: dict[Any, Run] = {}
    pruned = {path / name for path in {path.parent for path in paths} for name in _pruned(path)}
    for path in paths:
        run = _read(path, shared)
        if run.status == "unfinished" and path in pruned:
            run.status = "pruned"
        key = run.text("config_hash") or json.dumps([run.seed, run.settings], sort_keys=True, default=str)
        other = runs.setdefault(key, run)
        if other is not run:
            kept, left = (
                (other, run) if other.status == "finished" or run.status != "finished" else (run, other)
            )
            kept.notes = [*other.notes, f"{left.path} repeats {kept.path} and is left out."]
            runs[key] = kept
    return list(runs.values())


def _pruned(folder: Path) -> list[str]:
    """The runs that a search in ``folder`` has ended for their validation, as ``search.json`` tells."""
    told = _json(folder / "search.json")
    if safe.differs(told, {"trials": [{"run": str | None, "status": str}]}):
        return []
    return [trial["run"] for trial in told["trials"] if trial["run"] and trial["status"] == "pruned"]


def _link(path: Path) -> str | None:
    """Why nothing of a run is read: one of its files is a link out of its folder."""
    for name in OF_A_RUN:
        if os.path.islink(f"{path}/{name}") and not (path / name).resolve().is_relative_to(path.resolve()):  # noqa: PTH114  (quicker)
            return f"{path / name} is a link out of the run's folder"
    return None


def _read(path: Path, shared: dict[str, Settings]) -> Run:
    if fault := _link(path):
        return Run(path, "failed", fault, {}, {}, None, known=False)
    result, error = _result(path / "result.json")
    group = result.get("group_hash")
    whole = None if isinstance(group, str) and group in shared else _config(path)
    if isinstance(group, str) and whole is not None:
        shared[group] = whole[0]
    known = True
    settings, seed = whole if whole is not None else (shared.get(str(group)), None)
    if settings is None:
        error = error or f"{path / 'config.yaml'} cannot be read"
        settings = {
            f"{key}.name": str(result[key]) for key in ("method", "model", "dataset") if key in result
        }
        known = False
    told = result.get("seed", seed)
    status: Any = "failed" if error else result.get("status", "unfinished")
    if status not in ("finished", "unfinished"):
        error, status = error or str(result.get("error") or "no reason recorded"), "failed"
    tuning = _tuning(path / "tuning.json")
    return Run(path, status, error, result, settings, told if isinstance(told, int) else None, tuning, known)


def _result(file: Path) -> tuple[Mapping[str, Any], str | None]:
    """The result, empty where there is none, and why it cannot be used."""
    try:
        found = safe.read_json(file)
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"{file} cannot be read ({error.strerror})"
    except ValueError as error:
        return {}, f"{file} is damaged or cut short ({error})"
    if not isinstance(found, dict):
        return {}, f"{file} holds no result"
    return found, safe.too_new(file, found) or None


def _tuning(file: Path) -> Mapping[str, Any] | None:
    found = _json(file)
    good = (
        isinstance(found, dict)
        and isinstance(found.get("parameter"), str)
        and isinstance(found.get("trials"), int)
    )
    return found if good else None


def _config(path: Path) -> tuple[Settings, int | None] | None:
    """The frozen settings and the seed, from the stored change, which JSON makes quick to read, or else from ``config.yaml``."""
    about = _json(path / "delta" / "delta.json")
    found = about.get("config") if isinstance(about, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("method"), dict):
        found = _yaml(path / "config.yaml")
    if not isinstance(found, dict) or not isinstance(found.get("method"), dict):
        return None
    seed = found.get("seed")
    kept = {key: value for key, value in later.enter(found).items() if key not in NOT_THE_RUN}
    leaves = {key: value for key, value in _leaves(kept, "") if key not in NOT_THE_RUN}
    return leaves, seed if isinstance(seed, int) else None


def _yaml(file: Path) -> Any:
    import yaml

    try:
        return safe.read_yaml(file)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for name, item in tree.items():
        yield from _leaves(item, f"{prefix}.{name}" if prefix else str(name))


def _json(file: Path) -> Any:
    try:
        return safe.read_json(file)
    except (OSError, ValueError):
        return None


def _at(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
