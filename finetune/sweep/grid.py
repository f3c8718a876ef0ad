"""The points of a sweep: the cross product of the given values, each a run.

All points are checked and frozen before the first one starts. A run folder is named by its content, so the same command again skips what
is finished and goes on with what is not.
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
from ..config.settings import Config
from ..errors import ConfigError, near
from ..storage.run_folder import RunFolder, run_folder
from ..system import safe

MAX_RUNS = 500
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One run of a sweep. ``label`` says in what it differs from the others, but for its seed; ``config`` has its ``name`` and ``run`` set."""

    label: str
    config: Config
    folder: RunFolder


def points(
    overrides: list[str],
    config_dir: Path | None = None,
    config_file: Path | None = None,
    *,
    max_runs: int = MAX_RUNS,
    say: Say = lambda line: None,
) -> list[Point]:
    """Every point of the sweep, checked; points of the same content are one. Raises ``ConfigError`` with the faults of all points.

    ``sweep=NAME`` stands for the overrides of that file, ``budget=SIZE`` for the size of each method. ``say`` takes a line for whatever is left out.
    """
    name, overrides = with_preset(overrides, config_dir)
    budgets, overrides = _taken("budget", overrides)
    if fixed := [text for text in overrides if text.startswith("run=")]:
        raise ConfigError(
            f"{fixed[0]}: a sweep names its runs by their content. Use name= for the folder that holds them."
        )
    expanded = _without_foreign(configuration.expand(overrides, config_dir), overrides, config_dir, say)
    if budgets:
        expanded = _sized(expanded, budgets, overrides, config_dir, config_file, say)
    if len(expanded) > max_runs:
        raise ConfigError(
            f"The grid has {len(expanded):,} runs, more than {max_runs:,}. Sweep fewer values, or allow it: --max-runs {len(expanded)}."
        )
    found: dict[Path, Point] = {}
    faults: dict[str, list[str]] = {}
    for words in expanded:
        swept = [word for word in words if word not in overrides]
        try:
            point = _point(swept, configuration.load(words, config_dir, config_file), overrides, name)
            found.setdefault(point.folder.path, point)
        except ConfigError as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(" ".join(swept))
    if faults:
        raise ConfigError(*(fault + where(at, len(expanded)) for fault, at in faults.items()))
    return list(found.values())


def with_preset(overrides: list[str], config_dir: Path | None) -> tuple[str, list[str]]:
    """The name of a sweep without ``name=``, and the overrides with those of ``sweep=NAME`` in front, where they are not given anew."""
    given = [text.partition("=")[2] for text in overrides if text.startswith("sweep=")]
    rest = [text for text in overrides if not text.startswith("sweep=")]
    if len(given) > 1:
        raise ConfigError(f"sweep={given[0]} and sweep={given[1]} set the same thing; keep one of them.")
    keys = {text.partition("=")[0] for text in rest}
    stated = preset(given[0], config_dir) if given else []
    kept = [text for text in stated if text.partition("=")[0] not in keys]
    return given[0] if given and not rest else _name([*kept, *rest]), [*kept, *rest]


def preset(name: str, config_dir: Path | None = None) -> list[str]:
    """The overrides that ``sweep/NAME.yaml`` lists, in the user's folder or else in ours. Raises ``ConfigError``."""
    folders = [folder / "sweep" for folder in (config_dir, configuration.conf_dir()) if folder]
    file = next(
        (folder / f"{name}.yaml" for folder in folders if name and (folder / f"{name}.yaml").is_file()), None
    )
    if file is None:
        known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        raise ConfigError(
            f"sweep={name} is not a sweep.{near(name, known)} There is: {', '.join(known) or 'none; --config-dir DIR reads DIR/sweep'}."
        )
    try:
        stated = safe.read_yaml(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"sweep={name}: {file} cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if (
        not isinstance(stated, list)
        or not stated
        or not all(isinstance(text, str) and "=" in text for text in stated)
    ):
        raise ConfigError(
            f"sweep={name}: {file} should be a list of key=value, a line each, for example '- method=lora,snell'."
        )
    return stated


def _taken(key: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """The values of ``key``, split at commas, and the other overrides. Raises ``ConfigError`` when it is given twice."""
    given = [text for text in overrides if text.startswith(f"{key}=")]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} set the same thing; keep one of them.")
    values = [value for text in given for value in text.partition("=")[2].split(",")]
    return values, [text for text in overrides if text not in given]


def _sized(
    expanded: list[list[str]],
    budgets: list[str],
    overrides: list[str],
    config_dir: Path | None,
    config_file: Path | None,
    say: Say,
) -> list[list[str]]:
    """The points with the setting that makes each meet each budget; those whose method has a fixed size are left out, unless all have."""
    from .budget import FixedSize, solve

    found: list[list[str]] = []
    left_out: dict[str, FixedSize] = {}
    faults: dict[str, list[str]] = {}
    for words, budget in product(expanded, budgets):
        try:
            found.append(solve(budget, words, config_dir, config_file))
        except FixedSize as error:
            left_out[error.words] = error
        except ConfigError as error:
            swept = [word for word in words if word not in overrides] + (
                [f"budget={budget}"] if len(budgets) > 1 else []
            )
            for fault in error.faults:
                faults.setdefault(fault, []).append(" ".join(swept))
    if faults or not found:
        told = [fault + where(at, len(expanded) * len(budgets)) for fault, at in faults.items()]
        raise ConfigError(*told, *(left_out if not found else ()))
    for line in left_out:
        say(f"Left out: {line}")
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def _without_foreign(
    expanded: list[list[str]], overrides: list[str], config_dir: Path | None, say: Say
) -> list[list[str]]:
    """The points without swept settings that their method lacks and another of the sweep has; those that become equal are one."""
    names = dict.fromkeys(
        word.partition("=")[2] for words in expanded for word in words if word.startswith("method=")
    )
    if len(names) > 1:
        swept = {word.partition("=")[0] for words in expanded for word in words if word not in overrides}
        of_methods = {key: field for key in swept if (field := field_of(key))}
        lacks = {
            name: {key for key, field in of_methods.items() if not has_field(name, field, config_dir)}
            for name in names
        }
        foreign = set.intersection(*lacks.values())
        for name, keys in lacks.items():
            for key in sorted(keys - foreign):
                say(
                    f"method={name} has no {key.removeprefix('method.')}, so it is run once per other setting; budget= matches sizes."
                )
        expanded = [
            [
                word
                for word in words
                if word.partition("=")[0] not in lacks.get(method_of(words), set()) - foreign
            ]
            for words in expanded
        ]
    return [list(words) for words in dict.fromkeys(map(tuple, expanded))]


def method_of(words: list[str]) -> str:
    """The method that command-line words choose; "" where they choose none."""
    return next((word.partition("=")[2] for word in words if word.startswith("method=")), "")


def field_of(key: str) -> str | None:
    """The field of a method that a key sets; ``None`` for keys of other sections."""
    if key == "schedule":
        return key
    return key.split(".")[1] if key.startswith("method.") else None


@lru_cache(maxsize=256)
def _fields(method: str, config_dir: Path | None) -> frozenset[str] | None:
    """The settings of a method; ``None`` where it cannot be made without some, and its option is not its name."""
    try:
        made: object = configuration.load([f"method={method}"], config_dir).method
    except ConfigError:
        try:
            made = registry.get("method", method)
        except ConfigError:
            return None
    return frozenset(f.name for f in fields(made) if f.init)  # type: ignore[arg-type]  # methods are dataclasses


def has_field(method: str, field: str, config_dir: Path | None) -> bool:
    """Whether a method has a setting; true where that cannot be told."""
    known = _fields(method, config_dir)
    return known is None or field in known


def where(labels: list[str], of: int) -> str:
    """Which points have a fault that not all have."""
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return "" if len(labels) == of else f" (at {labels[0]}{more})"


def _point(swept: list[str], config: Config, overrides: list[str], name: str) -> Point:
    name = next((config.name for text in overrides if text.startswith("name=")), None) or name
    path = run_folder(replace(config, name=name, run=None))
    label = " ".join(word for word in swept if not word.startswith("seed=")) or config.method.name
    return Point(label, replace(config, name=name, run=path.name), RunFolder(path))


def _name(overrides: list[str]) -> str:
    """The default name: the same for the same overrides in any order."""
    return f"sweep-{hashlib.sha256(chr(10).join(sorted(overrides)).encode(errors='surrogatepass')).hexdigest()[:8]}"


def freeze(runs: Sequence[Point]) -> None:
    """Write the frozen configuration of each point into its folder. Raises ``ConfigError`` where other runs' files lie."""
    faults: list[str] = []
    for point in runs:
        try:
            point.folder.open_or_check(point.config)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(*faults)
