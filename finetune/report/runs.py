"""Find run folders and read what they hold.

A missing or damaged file never raises: its run counts as failed, and ``Run.error`` says why.
"""

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
from ..config.plugin_records import PluginRecord, read_records
from ..config.settings import NOT_THE_RUN as WITHOUT_EFFECT
from ..errors import ConfigError
from ..system import safe

NO_RESULT = ("failed", "pruned", "unfinished")  # statuses of runs without a result; only a search prunes
DEPTH = 4  # how many levels below a given folder are searched: outputs/NAME/RUN is two levels deep
SKIPPED_FOLDERS = {"trials", "wandb", "checkpoints", "inspect", "delta"}  # below a sweep or a run, never runs
NOT_THE_RUN = (*WITHOUT_EFFECT, "seed")  # settings in which repetitions of one experiment may differ
FILES_OF_A_RUN = (
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
    """A run folder that was read.

    ``settings`` is its frozen configuration as dotted keys, without ``NOT_THE_RUN``; where the configuration
    cannot be read, ``settings_complete`` is False and ``settings`` holds only what the result records.
    ``plugins`` are the plug-ins that the run uses.
    """

    path: Path
    status: Literal["finished", "failed", "pruned", "unfinished"]
    error: str | None
    result: Mapping[str, Any]
    settings: Settings
    seed: int | None
    tuning: Mapping[str, Any] | None = None
    settings_complete: bool = True
    notes: list[str] = field(default_factory=list)
    plugins: list[PluginRecord] = field(default_factory=list)

    def get_number(self, name: str) -> float | None:
        """Return a finite number of the result, such as ``test.accuracy`` or ``cost.peak_memory_bytes``."""
        found = look_up(self.result, f"metrics.{name}")
        if found is None:
            found = look_up(self.result, name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            return None
        return found

    def as_row(self) -> dict[str, Any]:
        """Return the run as one flat row: its state, its metrics, its numbers, and its settings."""
        row: dict[str, Any] = {"path": str(self.path), "status": self.status, "error": self.error}
        row["seed"] = self.seed
        for name in ("metrics", "params", "cost"):
            for key, value in _flatten(self.result.get(name) or {}, name):
                row[key.removeprefix("metrics.")] = value
        return row | self.settings

    def get_text(self, name: str) -> str | None:
        """Return a text of the result by its dotted name."""
        return _as_text(look_up(self.result, name))

    @cached_property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the weights that the run started from."""
        return _as_text(look_up(_read_json(self.path / "delta" / "delta.json"), "base_fingerprint"))

    def read_curve(self, key: str) -> list[tuple[int, float, float | None]]:
        """Read the validations from ``metrics.jsonl``: step, ``val_<key>`` and training loss.

        The loss is the mean since the previous validation. Damaged lines are left out.
        """
        return list(_parse_curve(safe.read_lines(self.path / "metrics.jsonl"), f"val_{key}"))


def get_numbers(runs: Iterable[Run], name: str) -> list[float]:
    """Return a number of each run that has it, by its dotted name."""
    found = []
    for run in runs:
        value = run.get_number(name)
        if value is not None:
            found.append(value)
    return found


def _parse_curve(lines: Iterable[str], key: str) -> Iterator[tuple[int, float, float | None]]:
    losses: list[float] = []
    for line in lines:
        if f'"{key}"' not in line:
            losses += map(float, LOSS.findall(line))
            continue
        try:
            found = json.loads(line)
            step, value = int(found["step"]), float(found[key])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if not math.isfinite(value):
            continue
        loss = math.fsum(losses) / len(losses) if losses else None
        yield step, value, loss
        losses = []


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return the run folders in and below ``folders``, each once.

    Raises ``ConfigError`` naming every folder that is missing or holds no run.
    """
    found: dict[Path, Path] = {}
    faults = []
    for folder in folders:
        if not folder.is_dir():
            faults.append(
                f"{folder}: there is no such folder. "
                "Give a run, a sweep's folder (outputs/NAME), or several of them."
            )
            continue
        runs = sorted(_find_below(folder, 0))
        if not runs:
            faults.append(
                f"{folder} holds no run: no folder in it has a config.yaml or result.json. "
                "Give outputs/NAME of a sweep."
            )
        for path in runs:
            found.setdefault(path.resolve(), path)
    if faults:
        raise ConfigError(*faults)
    return list(found.values())


def _find_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        is_folder = _list_folder(folder)
    except OSError:
        return
    if is_folder.get("config.yaml") is False or is_folder.get("result.json") is False:
        yield folder
        return
    if depth >= DEPTH:
        return
    for name, searchable in is_folder.items():
        if searchable and name not in SKIPPED_FOLDERS and not name.startswith("."):
            path = folder / name
            # A link may lead to a run, but the search must not wander over a whole disk.
            yield from _find_below(path, DEPTH if path.is_symlink() else depth + 1)


def _list_folder(folder: Path) -> dict[str, bool]:
    """Return the name of each entry and whether it is a folder."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_dir() for entry in entries}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs at ``paths``; of runs with one configuration, keep one, if possible a finished one."""
    settings_by_group: dict[str, Settings] = {}
    pruned = _find_pruned(paths)
    runs: dict[Any, Run] = {}
    for path in paths:
        run = _read_run(path, settings_by_group)
        if run.status == "unfinished" and path in pruned:
            run.status = "pruned"
        key = run.get_text("config_hash")
        if not key:
            key = json.dumps([run.seed, run.settings], sort_keys=True, default=str)
        if key in runs:
            run = _keep_one(runs[key], run)
        runs[key] = run
    return list(runs.values())


def _keep_one(earlier: Run, later: Run) -> Run:
    """Return the first finished of two runs of one configuration, with a note about the other."""
    kept, dropped = earlier, later
    if earlier.status != "finished" and later.status == "finished":
        kept, dropped = later, earlier
    kept.notes = [*earlier.notes, f"{dropped.path} repeats {kept.path} and is left out."]
    return kept


def _find_pruned(paths: Sequence[Path]) -> set[Path]:
    """Return the runs that a search pruned, according to the ``search.json`` beside them."""
    pruned = set()
    for folder in {path.parent for path in paths}:
        search = _read_json(folder / "search.json")
        if safe.find_mismatch(search, {"trials": [{"run": str | None, "status": str}]}):
            continue
        for trial in search["trials"]:
            if trial["run"] and trial["status"] == "pruned":
                pruned.add(folder / trial["run"])
    return pruned


def _find_outside_link(path: Path) -> str | None:
    """Return a fault if a file of the run is a link that leads out of its folder: such a run is not read."""
    for name in FILES_OF_A_RUN:
        is_link = os.path.islink(f"{path}/{name}")  # noqa: PTH114  (quicker than pathlib)
        if is_link and not (path / name).resolve().is_relative_to(path.resolve()):
            return f"{path / name} is a link out of the run's folder"
    return None


def _read_run(path: Path, settings_by_group: dict[str, Settings]) -> Run:
    if fault := _find_outside_link(path):
        return Run(path, "failed", fault, {}, {}, None, settings_complete=False)
    result, error = _read_result(path / "result.json")
    settings, seed = _read_settings(path, result.get("group_hash"), settings_by_group)
    complete = settings is not None
    if settings is None:
        error = error or f"{path / 'config.yaml'} cannot be read"
        settings = {}
        for key in ("method", "model", "dataset"):
            if key in result:
                settings[f"{key}.name"] = str(result[key])
    seed = _as_integer(result.get("seed", seed))
    status: Any = result.get("status", "unfinished")
    if error or status not in ("finished", "unfinished"):
        error = error or str(result.get("error") or "no reason recorded")
        status = "failed"
    tuning = _read_tuning(path / "tuning.json")
    used = read_records(path / "config.yaml")
    return Run(path, status, error, result, settings, seed, tuning, complete, plugins=used)


def _read_settings(
    path: Path, group: object, settings_by_group: dict[str, Settings]
) -> tuple[Settings | None, int | None]:
    """Return the settings, which runs of one group share, and the seed if a configuration was read."""
    if isinstance(group, str) and group in settings_by_group:
        return settings_by_group[group], None
    found = _read_config(path)
    if found is None:
        return None, None
    if isinstance(group, str):
        settings_by_group[group] = found[0]
    return found


def _read_result(file: Path) -> tuple[Mapping[str, Any], str | None]:
    """Return the result, empty if there is none, and why it cannot be used."""
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
    return found, safe.explain_newer_format(file, found) or None


def _read_tuning(file: Path) -> Mapping[str, Any] | None:
    found = _read_json(file)
    if not isinstance(found, dict):
        return None
    if not isinstance(found.get("parameter"), str) or not isinstance(found.get("trials"), int):
        return None
    return found


def _read_config(path: Path) -> tuple[Settings, int | None] | None:
    """Return the frozen settings and the seed; None if neither file has them.

    ``delta/delta.json`` is tried first: JSON is much quicker to read than the YAML of ``config.yaml``.
    """
    found = look_up(_read_json(path / "delta" / "delta.json"), "config")
    if not _has_method(found):
        found = _read_yaml(path / "config.yaml")
    if not _has_method(found):
        return None
    settings: Settings = {}
    for name, item in later.enter(found).items():
        if name not in NOT_THE_RUN:
            for key, value in _flatten(item, str(name)):
                if key not in NOT_THE_RUN:
                    settings[key] = value
    return settings, _as_integer(found.get("seed"))


def _has_method(config: Any) -> bool:
    return isinstance(config, dict) and isinstance(config.get("method"), dict)


def _read_yaml(file: Path) -> Any:
    import yaml

    try:
        return safe.read_yaml(file)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries by their dotted names; an empty dictionary is a leaf."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for name, item in tree.items():
        yield from _flatten(item, f"{prefix}.{name}")


def _read_json(file: Path) -> Any:
    try:
        return safe.read_json(file)
    except (OSError, ValueError):
        return None


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _as_integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def look_up(tree: Any, name: str) -> Any:
    """Return the value at a dotted name of nested mappings, or None."""
    for key in name.split("."):
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree
