"""The points of a sweep: the cross product of the given values; each point is a run.

All points are checked and frozen before the first one starts. A run folder is named by its content, so
repeating the command skips finished runs and resumes unfinished ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import yaml

from .. import registry
from ..config import load as configuration
from ..config.grammar import PLACED
from ..config.settings import Config
from ..errors import ConfigError, suggest_nearest
from ..storage.run_folder import RunFolder, run_folder
from ..system import safe

MAX_RUNS = 500
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    ``label`` names the settings in which it differs from the others, without its seed. ``config`` has its
    ``name`` and ``run`` set.
    """

    label: str
    config: Config
    folder: RunFolder


class Faults:
    """Faults of points, each with the labels of the points that have it."""

    def __init__(self) -> None:
        self._labels: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._labels)

    def add(self, error: ConfigError, label: str) -> None:
        """Record the faults of the point called ``label``."""
        for fault in error.faults:
            self._labels.setdefault(fault, []).append(label)

    def lines(self, total: int) -> list[str]:
        """Return each fault once, with the points that have it unless all ``total`` points do."""
        return [fault + labels_of_some(labels, total) for fault, labels in self._labels.items()]


def labels_of_some(labels: list[str], total: int) -> str:
    """Return a note that names the points which have a fault; empty if all ``total`` points have it."""
    if len(labels) == total:
        return ""
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f" (at {labels[0]}{more})"


def list_points(
    overrides: list[str],
    config_dir: Path | None = None,
    config_file: Path | None = None,
    *,
    max_runs: int = MAX_RUNS,
    say: Say = lambda line: None,
) -> list[Point]:
    """Return every point of the sweep, checked; points of the same content become one.

    ``sweep=NAME`` stands for the overrides of that file, ``budget=SIZE`` for the size of each method. ``say``
    is called with a line about every point or setting that is left out. Raises ``ConfigError`` with the
    faults of all points.
    """
    name, overrides = with_preset(overrides, config_dir)
    budgets, overrides = _take_values("budget", overrides)
    for text in overrides:
        if text.startswith("run="):
            raise ConfigError(
                f"{text}: a sweep names its runs by their content. Use name= to name the folder of the runs."
            )
    expanded = configuration.expand(overrides, config_dir)
    expanded = _drop_foreign(expanded, overrides, config_dir, say)
    if budgets:
        expanded = _meet_budgets(expanded, budgets, overrides, config_dir, config_file, say)
    if len(expanded) > max_runs:
        raise ConfigError(
            f"The grid has {len(expanded):,} runs, more than {max_runs:,}. Sweep fewer values, or allow it: "
            f"--max-runs {len(expanded)}."
        )
    found: dict[Path, Point] = {}
    faults = Faults()
    for words in expanded:
        swept = [word for word in words if word not in overrides]
        try:
            config = configuration.load(words, config_dir, config_file)
            point = _make_point(swept, config, overrides, name)
            found.setdefault(point.folder.path, point)
        except ConfigError as error:
            faults.add(error, " ".join(swept))
    if faults:
        raise ConfigError(*faults.lines(len(expanded)))
    return list(found.values())


def with_preset(overrides: list[str], config_dir: Path | None) -> tuple[str, list[str]]:
    """Return the default name of the sweep, and the overrides with ``sweep=NAME`` expanded.

    The overrides of the preset come first, so a setting that is given beside it wins.
    """
    presets, rest = _split(overrides, "sweep=")
    if len(presets) > 1:
        raise ConfigError(f"{presets[0]} and {presets[1]} set the same thing; keep one of them.")
    if not presets:
        return _name(rest), rest
    name = presets[0].partition("=")[2]
    given = {_key(text) for text in rest}
    stated = [text for text in preset(name, config_dir) if _key(text) not in given]
    if not rest:
        return name, stated
    return _name([*stated, *rest]), [*stated, *rest]


def _split(texts: list[str], start: str) -> tuple[list[str], list[str]]:
    """Return the texts that start with ``start``, and the others."""
    found = [text for text in texts if text.startswith(start)]
    return found, [text for text in texts if not text.startswith(start)]


def _key(text: str) -> str:
    return text.partition("=")[0]


def preset(name: str, config_dir: Path | None = None) -> list[str]:
    """Return the overrides in the user's ``sweep/NAME.yaml``, or else in the built-in file.

    Raises ``ConfigError``.
    """
    folders = [folder / "sweep" for folder in (config_dir, configuration.conf_dir()) if folder]
    files = [folder / f"{name}.yaml" for folder in folders if name]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        known = set()
        for folder in folders:
            known |= {other.stem for other in folder.glob("*.yaml")}
        there = ", ".join(sorted(known)) or "none; --config-dir DIR reads DIR/sweep"
        raise ConfigError(
            f"sweep={name} is not a sweep.{suggest_nearest(name, sorted(known))} There is: {there}."
        )
    try:
        stated = safe.read_yaml(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"sweep={name}: {file} cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if not stated or not isinstance(stated, list) or not all(_is_setting(text) for text in stated):
        raise ConfigError(
            f"sweep={name}: {file} should be a list of key=value, one per line, for example "
            "'- method=lora,snell'."
        )
    return stated


def _is_setting(text: object) -> bool:
    return isinstance(text, str) and "=" in text


def _take_values(key: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return the values of ``key``, split at commas, and the other overrides.

    Raises ``ConfigError`` when the key is given twice.
    """
    given, rest = _split(overrides, f"{key}=")
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} set the same thing; keep one of them.")
    if not given:
        return [], rest
    return given[0].partition("=")[2].split(","), rest


def _meet_budgets(
    expanded: list[list[str]],
    budgets: list[str],
    overrides: list[str],
    config_dir: Path | None,
    config_file: Path | None,
    say: Say,
) -> list[list[str]]:
    """Return each point once for each budget, with the setting that makes it meet the budget.

    Points whose method has a fixed size are left out; if all have one, ``ConfigError`` is raised.
    """
    from .budget import FixedSize
    from .solve import solve

    found: list[list[str]] = []
    left_out: dict[str, None] = {}
    faults = Faults()
    for words, budget in product(expanded, budgets):
        try:
            found.append(solve(budget, words, config_dir, config_file))
        except FixedSize as error:
            left_out[error.words] = None
        except ConfigError as error:
            swept = [word for word in words if word not in overrides]
            if len(budgets) > 1:
                swept.append(f"budget={budget}")
            faults.add(error, " ".join(swept))
    if not found:
        raise ConfigError(*faults.lines(len(expanded) * len(budgets)), *left_out)
    if faults:
        raise ConfigError(*faults.lines(len(expanded) * len(budgets)))
    for line in left_out:
        say(f"Left out: {line}")
    return _unique(found)


def _drop_foreign(
    expanded: list[list[str]], overrides: list[str], config_dir: Path | None, say: Say
) -> list[list[str]]:
    """Remove from each point the swept settings that its method lacks, if another method has them.

    Points that become equal are merged into one.
    """
    methods = dict.fromkeys(method_of(words) for words in expanded)
    if len(methods) < 2:
        return _unique(expanded)
    fields_swept: dict[str, str] = {}  # by the key of each swept setting of methods
    for words in expanded:
        for word in words:
            field = field_of(_key(word))
            if field and word not in overrides:
                fields_swept[_key(word)] = field
    lacks: dict[str, set[str]] = {}
    for method in methods:
        lacks[method] = {
            key for key, field in fields_swept.items() if not has_field(method, field, config_dir)
        }
    unknown = set.intersection(*lacks.values())  # keys that no method has; refused later
    for method, keys in lacks.items():
        for key in sorted(keys - unknown):
            say(
                f"method={method} has no {key.removeprefix('method.')}, so the values of that setting do not "
                "multiply its runs. To compare methods at equal size, use budget=."
            )
    kept = []
    for words in expanded:
        foreign = lacks[method_of(words)] - unknown
        kept.append([word for word in words if _key(word) not in foreign])
    return _unique(kept)


def _unique(expanded: list[list[str]]) -> list[list[str]]:
    """Return the points in their order without duplicates."""
    return [list(words) for words in dict.fromkeys(tuple(words) for words in expanded)]


def method_of(words: list[str]) -> str:
    """Return the method that the words of a command line choose; "" where they choose none."""
    for word in words:
        if word.startswith("method="):
            return word.partition("=")[2]
    return ""


def field_of(key: str) -> str | None:
    """Return the field of a method that a key sets; ``None`` for keys of other sections."""
    place = PLACED.get(key, key)
    return place.split(".")[1] if place.startswith("method.") else None


@lru_cache(maxsize=256)
def _fields(method: str, config_dir: Path | None) -> frozenset[str] | None:
    """Return the settings of a method.

    Returns ``None`` if they are unknown, because the method has a setting without default and the option that
    chooses the method is not the method's name.
    """
    try:
        made: object = configuration.load([f"method={method}"], config_dir).method
    except ConfigError:
        try:
            made = registry.get("method", method)
        except ConfigError:
            return None
    settings = fields(made)  # type: ignore[arg-type]  # methods are dataclasses
    return frozenset(field.name for field in settings if field.init)


def has_field(method: str, field: str, config_dir: Path | None) -> bool:
    """Tell whether a method has a setting; true if that is unknown."""
    known = _fields(method, config_dir)
    return known is None or field in known


def _make_point(swept: list[str], config: Config, overrides: list[str], name: str) -> Point:
    """Return the point of a configuration; its folder is ``name`` unless ``name=`` was given."""
    if any(text.startswith("name=") for text in overrides):
        name = config.name or name
    path = run_folder(replace(config, name=name, run=None))
    label = " ".join(word for word in swept if not word.startswith("seed=")) or config.method.name
    return Point(label, replace(config, name=name, run=path.name), RunFolder(path))


def _name(overrides: list[str]) -> str:
    """Return the default name of a sweep, which is the same for the same overrides in any order."""
    text = "\n".join(sorted(overrides))
    return f"sweep-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def freeze(runs: Sequence[Point]) -> None:
    """Write the frozen configuration of each point into its folder.

    Raises ``ConfigError`` if a folder holds files of another run.
    """
    faults: list[str] = []
    for point in runs:
        try:
            point.folder.open_or_check(point.config)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(*faults)
