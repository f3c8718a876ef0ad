"""One ``key=value`` in Hydra's grammar, with what it cannot read, or would not end with, said in our words."""

from __future__ import annotations

import re
from itertools import accumulate

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    OverrideType,
    Quote,
    QuotedString,
    RangeSweep,
)
from hydra.errors import HydraException

from .. import registry
from ..errors import ConfigError

ALIASES = {"sparsity": "method.sparsity"}
# Groups whose file becomes a value inside a section; their settings may be written without the section's name.
PLACED = {kind.name: place for place, kind in registry.nested().items()}
KEY = re.compile(r"\w[\w/-]*(\.[\w-]+)*")
FUNCTION = re.compile(r"(range|choice|interval|glob|tag|sort|shuffle)\(")
LONGEST, NESTED = (
    4096,
    20,
)  # characters and brackets within brackets of a value: Hydra's parser takes 2 s for a list of 2,000


def parsed(overrides: list[str]) -> tuple[list[Override], list[str]]:
    """Each override as Hydra reads it, and the faults of those that cannot be read."""
    found, faults = list[Override](), list[str]()
    for text in overrides:
        try:
            found.append(override(text))
        except ConfigError as error:
            faults += error.faults
    return found, faults


def override(text: str) -> Override:
    """One ``key=value``, its value quoted where Hydra's grammar cannot read it (a path with ``=``, an address)."""
    key, sign, value = text.partition("=")
    if text.startswith("-"):
        raise ConfigError(
            f"{text} is not an option here (see --help). Settings are written key=value, for example train.steps=100."
        )
    if text.startswith(("+", "~")):
        raise ConfigError(
            f"{text}: settings are neither added nor removed, so '{text[0]}' means nothing here. Write key=value for a setting that exists."
        )
    if not sign or not KEY.fullmatch(key):
        raise ConfigError(f"{text!r} is not of the form key=value, for example train.steps=100.")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(
            f"{text} is no UTF-8, which the files of a run are written in. Rename what it names."
        )
    if len(text) > LONGEST or max(accumulate((c in "[{(") - (c in "]})") for c in value), default=0) > NESTED:
        raise ConfigError(
            f"{text}: a value has at most {LONGEST:,} characters and {NESTED} brackets within brackets. Put it into a YAML file."
        )
    parser = OverridesParser.create()
    try:
        found = parser.parse_override(text)
    except HydraException:
        if FUNCTION.match(value) and value.count("(") != value.count(")"):
            less = value.count(")") < value.count("(")
            raise ConfigError(
                f"{text}: a bracket {'is missing' if less else 'is too many'}, as range(0,5) shows. Text is quoted: '{key}=\"...\"'."
            ) from None
        try:
            found = parser.parse_override(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
        except HydraException as error:
            raise ConfigError(f"{text} cannot be read: {error}. Put the value into a YAML file.") from None
    found.key_or_group, found.input_line = _full(key), text
    assert found.type is OverrideType.CHANGE
    return found


def _full(key: str) -> str:
    """``method.schedule.every`` for ``schedule.every``."""
    head, dot, rest = key.partition(".")
    return f"{PLACED[head]}.{rest}" if dot and head in PLACED else ALIASES.get(key, key)


def unlisted(item: Override, most: int) -> str | None:
    """Why the values of a sweep cannot be listed, where Hydra does not say it or would not end."""
    value, key = item.value(), item.key_or_group
    if isinstance(value, IntervalSweep):
        return f"{item.input_line}: only a search chooses from an interval: --search optuna --trials 20. For a grid write {key}=1,2 or {key}=range(0,5)."
    if not isinstance(value, RangeSweep) or value.start is None or value.stop is None:
        return None
    if not value.step or not all(abs(number) < 1e300 for number in (value.start, value.stop, value.step)):
        return f"{item.input_line}: a range takes numbers, and a step other than 0, as in {key}=range(0,5) or {key}=range(0,6,2)."
    if (value.stop - value.start) * (1 if value.step > 0 else -1) > most * abs(value.step):
        return f"{item.input_line}: the grid has more than {most:,} points, more than can be listed. Sweep fewer values."
    return None
