"""Parse ``key=value`` in Hydra's grammar; refuse, in plain words, invalid texts and endless lists."""

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
STREAM = re.compile(r"streams\.[\w-]+")  # the key of a data stream, which takes an option of dataset
# Groups whose file becomes a value inside a section; their settings may leave out the section's name.
PLACED = {kind.name: place for place, kind in registry.nested().items()}
KEY = re.compile(r"\w[\w/-]*(\.[\w-]+)*")
FUNCTION = re.compile(r"(range|choice|interval|glob|tag|sort|shuffle)\(")
# Limits of a value, since Hydra's parser takes 2 s for a list of 2,000 values.
LONGEST = 4096  # characters
DEEPEST = 20  # brackets inside each other
LARGEST = 1e300  # of the numbers of a range; beyond it sums of steps overflow


def parse_all(overrides: list[str]) -> tuple[list[Override], list[str]]:
    """Return the overrides as Hydra reads them, and the faults of those that cannot be read."""
    found: list[Override] = []
    faults: list[str] = []
    for text in overrides:
        try:
            found.append(parse_override(text))
        except ConfigError as error:
            faults += error.faults
    return found, faults


def parse_override(text: str) -> Override:
    """Return one ``key=value`` as Hydra reads it, with its full key.

    A value that Hydra's grammar cannot read (a path with ``=``, an address) is quoted. Raises
    ``ConfigError``.
    """
    key, sign, value = text.partition("=")
    _refuse_form(text, key, sign)
    depth = max(accumulate((c in "[{(") - (c in "]})") for c in value), default=0)
    if len(text) > LONGEST or depth > DEEPEST:
        raise ConfigError(
            f"{text}: a value has at most {LONGEST:,} characters, and brackets at most {DEEPEST} levels "
            "deep. Put it into a YAML file."
        )
    found = _parse(text, key, value)
    found.key_or_group, found.input_line = _full_key(key), text
    assert found.type is OverrideType.CHANGE
    return found


def _refuse_form(text: str, key: str, sign: str) -> None:
    """Raise ``ConfigError`` unless ``text`` has the form of a setting."""
    if text.startswith("-"):
        raise ConfigError(
            f"{text} is not an option here (see --help). Settings are written key=value, for example "
            "train.steps=100."
        )
    if text.startswith(("+", "~")):
        raise ConfigError(
            f"{text}: settings are neither added nor removed, so '{text[0]}' has no meaning here. Write "
            "key=value for a setting that exists."
        )
    if not sign or not KEY.fullmatch(key):
        raise ConfigError(f"{text!r} is not of the form key=value, for example train.steps=100.")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(
            f"{text} is not UTF-8, and the files of a run are written in UTF-8. Rename the file or folder."
        )


def _parse(text: str, key: str, value: str) -> Override:
    """Parse ``text``, or else ``text`` with its value quoted."""
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except HydraException:
        if FUNCTION.match(value):
            _refuse_brackets(text, key, value)
    try:
        return parser.parse_override(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
    except HydraException as error:
        raise ConfigError(f"{text} cannot be read: {error}. Put the value into a YAML file.") from None


def _refuse_brackets(text: str, key: str, value: str) -> None:
    """Raise ``ConfigError`` if round brackets of a function do not match."""
    missing = value.count("(") - value.count(")")
    if missing:
        what = "a ) is missing" if missing > 0 else "there is a ) too many"
        raise ConfigError(f"{text}: {what}. Write range(0,5), or quote a text: '{key}=\"...\"'.")


def _full_key(key: str) -> str:
    """Return ``method.schedule.every`` for ``schedule.every``."""
    head, dot, rest = key.partition(".")
    if dot and head in PLACED:
        return f"{PLACED[head]}.{rest}"
    return ALIASES.get(key, key)


def group_of(key: str) -> str:
    """Return the group of YAML files that ``key`` may choose an option of: ``dataset`` for a data stream."""
    return "dataset" if STREAM.fullmatch(key) else key


def refuse_endless(item: Override, most: int) -> None:
    """Raise ``ConfigError`` if a sweep has no list of values, or one of more than ``most``.

    Hydra itself would run without end, or give no such message.
    """
    value, key = item.value(), item.key_or_group
    if isinstance(value, IntervalSweep):
        raise ConfigError(
            f"{item.input_line}: only a search chooses from an interval: --search optuna --trials 20. For a "
            f"grid write {key}=1,2 or {key}=range(0,5)."
        )
    if not isinstance(value, RangeSweep) or value.start is None or value.stop is None:
        return
    numbers = (value.start, value.stop, value.step)
    if not value.step or not all(abs(number) < LARGEST for number in numbers):
        raise ConfigError(
            f"{item.input_line}: a range takes numbers, and a step other than 0, as in {key}=range(0,5) or "
            f"{key}=range(0,6,2)."
        )
    length = value.stop - value.start if value.step > 0 else value.start - value.stop
    if length > most * abs(value.step):
        raise ConfigError(
            f"{item.input_line}: the grid has more than {most:,} points, more than can be listed. Sweep "
            "fewer values."
        )
