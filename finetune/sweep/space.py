"""What a search may choose from: intervals and choices, written in Hydra's grammar."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..config import load as configuration
from ..config.grammar import parse_override
from ..errors import ConfigError
from . import grid


@dataclass(frozen=True)
class Dimension:
    """One searched setting: the texts of its ``options``, or the closed interval from ``low`` to ``high``.

    ``log``: search the interval on a logarithmic scale. ``whole``: search whole numbers only.
    """

    key: str
    options: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def word(self, value: float | str) -> str:
        """Return ``key=value`` in the form that a run accepts."""
        return f"{self.key}={value}" if isinstance(value, str) else f"{self.key}={value!r}"

    def suggest(self, trial: Any) -> str:
        """Return the ``key=value`` that an Optuna trial chooses."""
        if self.options:
            return self.word(trial.suggest_categorical(self.key, self.options))
        if self.whole:
            return self.word(trial.suggest_int(self.key, round(self.low), round(self.high), log=self.log))
        return self.word(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def ends(self) -> list[str]:
        """Return ``key=value`` for every option, or for both ends of the interval."""
        if self.options:
            return [f"{self.key}={option}" for option in self.options]
        return [self._end(self.low), self._end(self.high)]

    def _end(self, value: float) -> str:
        return f"{self.key}={value:.0f}" if float(value).is_integer() else f"{self.key}={value!r}"


def space(
    overrides: list[str], config_dir: Path | None, config_file: Path | None = None
) -> tuple[list[str], list[Dimension]]:
    """Return the settings that stay the same, and the dimensions to search.

    Raises ``ConfigError`` that lists every value that no trial could take.
    """
    fixed, dimensions, faults = list[str](), list[Dimension](), list[str]()
    for text in overrides:
        try:
            dimension = _dimension(text, config_dir)
        except ConfigError as error:
            faults += error.faults
            continue
        if dimension is None:
            fixed.append(text)
        else:
            dimensions.append(dimension)
    if not faults and not dimensions:
        faults = [
            "Nothing is to be searched. Give a setting an interval or a choice: "
            "optimizer.lr=tag(log,interval(1e-4,1e-2)) method.rank=choice(2,4,8)."
        ]
    if faults:
        raise ConfigError(*faults)
    return fixed, _check_ends(fixed, dimensions, config_dir, config_file)


def _dimension(text: str, config_dir: Path | None) -> Dimension | None:
    """Return the dimension that the override ``text`` describes; ``None`` if it has a single value."""
    item = parse_override(text)
    key, value = str(item.key_or_group), cast(Any, item.value())
    if not item.is_sweep_override():
        return None
    if key == "seed":
        raise ConfigError(
            f"{text}: a search would choose a lucky seed. Search with one seed, then run the best settings "
            "with several seeds."
        )
    if not item.is_interval_sweep():
        words = configuration.expand([text], config_dir)
        options = [word.partition("=")[2] for [word] in words]
        return Dimension(key, tuple(dict.fromkeys(options)))
    low, high, log = float(value.start), float(value.end), "log" in value.tags
    example = f"as in {key}=tag(log,interval(1e-4,1e-2))"
    if not low < high:  # not ``low >= high``, so that nan is refused, too
        raise ConfigError(f"{text} is empty: the first value must be below the second, {example}.")
    if log and low <= 0:
        raise ConfigError(f"{text} needs a first value above 0, {example}.")
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    return Dimension(key, low=low, high=high, log=log, whole=whole)


def _check_ends(
    fixed: list[str], dimensions: list[Dimension], config_dir: Path | None, config_file: Path | None
) -> list[Dimension]:
    """Build a configuration for each end of each dimension; the others stay at their first end.

    Returns the dimensions, with ``whole`` set where a setting takes whole numbers only. Raises
    ``ConfigError`` with the faults of all ends.
    """
    methods = [""]
    for dimension in dimensions:
        if dimension.key == "method":
            methods = dimension.ends()
    faults: dict[str, None] = {}
    checked = []
    for dimension in dimensions:
        for method in _methods_with(dimension, methods, fixed, config_dir):
            beside = [method] if method else []
            for other in dimensions:
                if other.key not in ("method", dimension.key):
                    beside.append(other.ends()[0])
            beside = fitting(beside, fixed, config_dir)
            try:
                dimension = _with_type(dimension, [*fixed, *beside], config_dir, config_file)
                for end in [method] if dimension.key == "method" else dimension.ends():
                    grid.list_points([*fixed, *dict.fromkeys([*beside, end])], config_dir, config_file)
            except ConfigError as error:
                faults |= dict.fromkeys(error.faults)
        checked.append(dimension)
    if faults:
        raise ConfigError(*faults)
    return checked


def _methods_with(
    dimension: Dimension, methods: list[str], fixed: list[str], config_dir: Path | None
) -> list[str]:
    """Return those of ``methods`` that have the setting; if none has, the first, which is refused later."""
    if dimension.key == "method":
        return methods
    end = dimension.ends()[0]
    found = [method for method in methods if _is_taken(end, [method, *fixed], config_dir)]
    return found or methods[:1]


def _with_type(
    dimension: Dimension, words: list[str], config_dir: Path | None, config_file: Path | None
) -> Dimension:
    """Mark an interval between whole numbers as ``whole`` if the setting takes only whole numbers."""
    if dimension.options or dimension.whole:
        return dimension
    if not (dimension.low.is_integer() and dimension.high.is_integer()):
        return dimension
    settings = [word for word in words if not word.startswith(("budget=", "sweep="))]
    leaves = configuration.tree([*settings, f"{dimension.key}={dimension.low:.0f}"], config_dir, config_file)
    value, _ = leaves[dimension.key]
    return replace(dimension, whole=isinstance(value, int))


def fitting(words: list[str], fixed: list[str], config_dir: Path | None) -> list[str]:
    """Return ``words`` without the settings that the method among them lacks."""
    return [word for word in words if _is_taken(word, [*words, *fixed], config_dir)]


def _is_taken(word: str, words: list[str], config_dir: Path | None) -> bool:
    """Tell whether the method that ``words`` choose takes the setting of ``word``.

    Also true for settings of other sections, and if ``words`` choose no method: a setting that no method has
    is refused later.
    """
    method, field = grid.method_of(words), grid.field_of(word.partition("=")[0])
    if not method or not field:
        return True
    return grid.has_field(method, field, config_dir)
