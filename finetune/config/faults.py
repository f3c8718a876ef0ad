"""Describe what is wrong with a setting: its key, its value, where the value came from, and the cure."""

from __future__ import annotations

import difflib
from typing import Any

from .. import registry
from ..errors import ConfigError
from .classes import CHOSEN, NESTED, OUTSIDE_SECTIONS, SECTIONS, STREAMS, known_settings
from .composed import Composed
from .origins import flat

PLAIN_WORDS = {  # by pydantic's own words
    "a valid array": "a list, written [a,b]",
    "an object": "a mapping",
    "a valid boolean": "true or false",
    "Field required": "too few entries",
}
WHOLE_SENTENCES = (
    "Tuple",
    "List",
    "Field",
    "Dict",
    "Value",
)  # start messages of pydantic that name their subject
_PLACES_IN_SECTIONS = {kind.place for kind in registry.KINDS.values() if "." in kind.place}
MOST = 50  # wrong settings of a section that are described one by one


def describe_errors(errors: list[Any], cls: type, section: str, composed: Composed) -> list[str]:
    """Return one sentence for each wrong key of a section; errors of the branches of a union share one."""
    by_key: dict[str, list[Any]] = {}
    for error in errors:
        place = _in_input(error["loc"], composed.at(section))
        by_key.setdefault(dotted(section, place), []).append(error)
    sentences: list[str] = []
    for key in list(by_key)[:MOST]:
        sentences += _describe(key, by_key[key], cls, section, composed)
    if len(by_key) > MOST:
        sentences.append(f"{len(by_key) - MOST:,} more settings of {section or 'the run'} are wrong.")
    return sentences


def dotted(section: str, place: tuple[Any, ...]) -> str:
    """Return the dotted key of a place inside a section."""
    steps = [str(step) for step in place]
    return ".".join([section, *steps] if section else steps)


def title_of(section: str, cls: Any) -> str:
    """Return ``method=lora`` or ``schedule=grow``; the name of a section if its class is fixed."""
    if section.startswith(f"{STREAMS}."):
        return f"{section}={cls.name}"
    leaf = section.rpartition(".")[2]
    return f"{leaf}={cls.name}" if leaf in CHOSEN or leaf in NESTED else leaf


def _in_input(location: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Return the part of pydantic's location that exists in the input, without the branches of unions."""
    for depth, step in enumerate(location):
        if isinstance(value, dict):
            exists = step in value
        else:
            exists = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if not exists:
            return location[: max(depth, 1)]
        value = value[step]
    return location


def _describe(key: str, errors: list[Any], cls: type, section: str, composed: Composed) -> list[str]:
    """Return the sentences for the errors of one key."""
    kind, value = errors[0]["type"], errors[0]["input"]
    if kind == "missing" and len(errors[0]["loc"]) == 1:
        where = composed.origin(key)
        by = f" ({where} leaves it open)" if where else ""
        return [f"{key} is not set{by}. Add {key}=VALUE."]
    if kind == "extra_forbidden":
        return _describe_unknown(key, value, cls, section, composed)
    reasons = {}
    for error in errors:
        reason = error["msg"].removeprefix("Input should be ")
        reasons[PLAIN_WORDS.get(reason, reason)] = reason
    verb = " should be"
    for reason in reasons.values():
        if reason.startswith(WHOLE_SENTENCES):
            verb = ":"
    return [f"{composed.describe(key, composed.at(key))}{verb} {' or '.join(reasons)}."]


def _describe_unknown(key: str, value: Any, cls: type, section: str, composed: Composed) -> list[str]:
    """Return the sentences for a key that the class does not have; ``value`` may hold several settings."""
    owner = f" of {title_of(section, cls)}" if section else ""
    leaf = key.rpartition(".")[2]
    if key not in _PLACES_IN_SECTIONS:
        sentences = []
        for full, inner in flat(value, key):
            hint = _suggest(full, composed)
            sentences.append(f"{composed.describe(full, inner)} is not a setting{owner}.{hint}")
        return sentences
    if isinstance(value, dict) and value.get("name"):
        subjects = [f"{leaf}={value['name']}"]
    else:
        subjects = [composed.describe(full, inner) for full, inner in flat(value, key)]
    cure = f"Leave it out, or choose a {section} that has one."
    return [f"{subject} is not a setting{owner}, which has no {leaf}. {cure}" for subject in subjects]


def _suggest(key: str, composed: Composed) -> str:
    """Return a hint: the nearest setting beside ``key``, else the nearest of all, else those beside it."""
    known = known_settings(composed)
    parent, _, leaf = key.rpartition(".")
    beside = [full for full in known if full.rpartition(".")[0] == parent]
    if not beside and (parent in SECTIONS or parent.rpartition(".")[2] in NESTED):
        return " It has none."
    for pool in (beside, known):
        near = _nearest(key, leaf, pool)
        if near:
            return f" Did you mean {near!r}?"
    return f" There is: {', '.join(beside or [*OUTSIDE_SECTIONS, *SECTIONS])}."


def _nearest(key: str, leaf: str, pool: list[str]) -> str | None:
    """Return the key of ``pool`` whose last name is close to ``leaf``; of several the closest to ``key``."""
    leaves = [full.rpartition(".")[2] for full in pool]
    names = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    if not names:
        return None
    same = [full for full in pool if full.rpartition(".")[2] == names[0]]
    return difflib.get_close_matches(key, same, n=1, cutoff=0)[0]


def refuse(faults: list[str]) -> None:
    """Raise ``ConfigError`` with all ``faults`` if there are any."""
    if faults:
        raise ConfigError(*faults)
