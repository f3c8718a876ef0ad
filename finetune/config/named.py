"""Read one registered class and its options from words: ``what=NAME what.OPTION=VALUE``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .. import registry
from ..errors import ConfigError, suggest_nearest
from .composed import Composed
from .grammar import parse_all
from .strict import build_instance


def read_named(kind: str, key: str, words: list[str]) -> Any:
    """Return an instance of the class of ``kind`` that ``KEY=NAME`` names, with options ``KEY.OPTION=VALUE``.

    Raises ``ConfigError`` with every fault.
    """
    names = [word.removeprefix(f"{key}=") for word in words if word.startswith(f"{key}=")]
    parsed, faults = parse_all([word for word in words if not word.startswith(f"{key}=")])
    known = registry.catalog(kind)
    there_is = f"There is: {', '.join(known)}."
    if len(names) != 1:
        count = f", not {len(names)}" if names else ""
        raise ConfigError(*faults, f"Name one {kind} by {key}=NAME{count}. {there_is}")
    name = names[0]
    if name not in known:
        raise ConfigError(*faults, f"{key}={name} is no {kind}.{suggest_nearest(name, known)} {there_is}")
    cls = registry.get(kind, name)
    allowed = [item.name for item in fields(cls)]
    given: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for item in parsed:
        option = item.key_or_group.removeprefix(f"{key}.")
        fault = _find_fault(item, option, given, f"{key}={name}", allowed)
        if fault:
            faults.append(f"{item.input_line}{fault}")
            continue
        given[option] = item.value()
        texts[f"{key}.{option}"] = (item.input_line or "").partition("=")[2]
    composed = Composed({key: given}, dict.fromkeys(texts, "command line"), texts)
    made, wrong = build_instance(cls, given, key, composed)
    if faults or wrong:
        raise ConfigError(*faults, *wrong)
    return made


def _find_fault(item: Any, option: str, given: dict[str, Any], choice: str, allowed: list[str]) -> str | None:
    """Return what is wrong with a parsed word, as the end of a sentence about it, or None."""
    if option not in allowed:
        hint = " It has none."
        if allowed:
            hint = f"{suggest_nearest(option, allowed)} There is: {', '.join(allowed)}."
        return f" is not an option of {choice}.{hint}"
    if option in given:
        return f": {option} is given twice. Give it once."
    if item.is_sweep_override():
        return f": {option} takes one value here. Give one."
    return None
