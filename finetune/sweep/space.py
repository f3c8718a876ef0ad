"""What a search may choose from: intervals and choices, as Hydra's grammar writes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..config import load as configuration
from ..config.grammar import override
from ..errors import ConfigError
from . import grid


@dataclass(frozen=True)
class Dimension:
    """One setting: the texts of its ``options``, or what lies between ``low`` and ``high``, both included, whole numbers only if ``whole``."""

    key: str
    options: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def word(self, value: float | str) -> str:
        """``key=value`` as a run takes it."""
        return f"{self.key}={value if isinstance(value, str) else repr(value)}"

    def suggest(self, trial: Any) -> str:
        """What an Optuna trial chooses."""
        if self.options:
            return self.word(trial.suggest_categorical(self.key, self.options))
        if self.whole:
            return self.word(trial.suggest_int(self.key, round(self.low), round(self.high), log=self.log))
        return self.word(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def ends(self) -> list[str]:
        """Every option, or both ends of the interval."""
        values = self.options or [
            f"{end:.0f}" if float(end).is_integer() else repr(end) for end in (self.low, self.high)
        ]
        return [f"{self.key}={value}" for value in values]


def space(
    overrides: list[str], config_dir: Path | None, config_file: Path | None = None
) -> tuple[list[str], list[Dimension]]:
    """The settings that stay, and those that are searched. Raises ``ConfigError`` for whatever none of the trials could take."""
    fixed, found, faults = list[str](), list[Dimension](), list[str]()
    for text in overrides:
        try:
            dimension = _dimension(text, config_dir)
            (found.append(dimension) if dimension else fixed.append(text))
        except ConfigError as error:
            faults += error.faults
    if not faults and not found:
        faults = [
            "Nothing is to be searched. Give a setting an interval or a choice: optimizer.lr=tag(log,interval(1e-4,1e-2)) method.rank=choice(2,4,8)."
        ]
    if faults:
        raise ConfigError(*faults)
    return fixed, _checked(fixed, found, config_dir, config_file)


def _dimension(text: str, config_dir: Path | None) -> Dimension | None:
    """What ``text`` searches; ``None`` for one value."""
    item = override(text)
    key, value = str(item.key_or_group), cast(Any, item.value())
    if not item.is_sweep_override():
        return None
    if key == "seed":
        raise ConfigError(
            f"{text}: a search would choose the seed that was lucky. Search with one, and run what it found with several."
        )
    if not item.is_interval_sweep():
        words = configuration.expand([text], config_dir)
        return Dimension(key, tuple(dict.fromkeys(word.partition("=")[2] for [word] in words)))
    low, high, log = float(value.start), float(value.end), "log" in value.tags
    if not low < high or (log and low <= 0):
        what = (
            "needs a first value above 0"
            if low < high
            else "is empty: the first value must be below the second"
        )
        raise ConfigError(f"{text} {what}, as in {key}=tag(log,interval(1e-4,1e-2)).")
    return Dimension(
        key, low=low, high=high, log=log, whole=isinstance(value.start, int) and isinstance(value.end, int)
    )


def _checked(
    fixed: list[str], found: list[Dimension], config_dir: Path | None, config_file: Path | None
) -> list[Dimension]:
    """The dimensions, those of whole settings marked as such, once each of their ends was tried beside the first ones of the others."""
    faults: dict[str, None] = {}
    methods = next((d.ends() for d in found if d.key == "method"), [""])
    for i, dimension in enumerate(found):
        fits = [
            m
            for m in methods
            if dimension.key == "method" or _taken(dimension.ends()[0], [m, *fixed], config_dir)
        ]
        for method in fits or methods[:1]:  # what no method has is refused as ever
            others = [
                *([method] if method else []),
                *(d.ends()[0] for d in found if d.key not in ("method", dimension.key)),
            ]
            others = fitting(others, fixed, config_dir)
            try:
                found[i] = dimension = _typed(dimension, [*fixed, *others], config_dir, config_file)
                for end in dimension.ends() if dimension.key != "method" else [method]:
                    grid.points([*fixed, *dict.fromkeys([*others, end])], config_dir, config_file)
            except ConfigError as error:
                faults |= dict.fromkeys(error.faults)
    if faults:
        raise ConfigError(*faults)
    return found


def _typed(
    dimension: Dimension, words: list[str], config_dir: Path | None, config_file: Path | None
) -> Dimension:
    """An interval from one whole number to another is one of whole numbers where the setting takes no others."""
    if (
        dimension.options
        or dimension.whole
        or not (dimension.low.is_integer() and dimension.high.is_integer())
    ):
        return dimension
    plain = [word for word in words if not word.startswith(("budget=", "sweep="))]
    value = configuration.tree([*plain, f"{dimension.key}={dimension.low:.0f}"], config_dir, config_file)[
        dimension.key
    ][0]
    return replace(dimension, whole=isinstance(value, int))


def fitting(words: list[str], fixed: list[str], config_dir: Path | None) -> list[str]:
    """``words`` without the settings that the method among them lacks."""
    return [word for word in words if _taken(word, [*words, *fixed], config_dir)]


def _taken(word: str, words: list[str], config_dir: Path | None) -> bool:
    """Whether the method that ``words`` choose has the setting of ``word``, if it is one of methods; what no method has is refused later."""
    method, field = grid.method_of(words), grid.field_of(word.partition("=")[0])
    searched = any(other.startswith("method=") for other in words)
    return not (searched and method and field) or grid.has_field(method, field, config_dir)
