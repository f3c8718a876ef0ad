"""Read one option of a group that is not part of a run, such as ``what=NAME what.OPTION=VALUE``.

NAME is a YAML file of the group, a preset among them, as for the groups of a run.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from ..errors import ConfigError, suggest_nearest
from .classes import class_named_in
from .compose import compose_outside, find_options_outside
from .composed import Composed
from .grammar import parse_all, parse_override
from .strict import build_instance


def read_named(kind: str, key: str, words: list[str], config_dir: Path | None = None) -> Any:
    """Return an instance of the class that the option ``KEY=NAME`` of the group ``kind`` names.

    Its options are ``KEY.OPTION=VALUE`` or ``OPTION=VALUE``, laid on the values of the file. A list can be
    written ``a,b``. Raises ``ConfigError`` with every fault.
    """
    names = [word.removeprefix(f"{key}=") for word in words if word.startswith(f"{key}=")]
    parsed, faults = parse_all([word for word in words if not word.startswith(f"{key}=")])
    known = find_options_outside(kind, config_dir)
    there_is = f"There is: {', '.join(known)}."
    if len(names) != 1:
        count = f", not {len(names)}" if names else ""
        raise ConfigError(*faults, f"Name one {kind} by {key}=NAME{count}. {there_is}")
    name = names[0]
    if name not in known:
        raise ConfigError(*faults, f"{key}={name} is no {kind}.{suggest_nearest(name, known)} {there_is}")
    try:
        composed = _place(compose_outside(kind, name, config_dir), kind, key)
        cls, values = class_named_in(kind, composed.values[key], key, composed)
    except ConfigError as error:
        raise ConfigError(*faults, *error.faults) from None
    allowed = [item.name for item in fields(cls)]
    for option in list(values):
        if option not in allowed:
            shown = composed.describe(f"{key}.{option}", values.pop(option))
            faults.append(shown + _describe_unknown(option, f"{key}={name}", allowed))
    given: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for item in parsed:
        option = item.key_or_group.removeprefix(f"{key}.").removeprefix("method.")  # an alias has it
        value, fault = _read_value(item, option, cls, allowed, f"{key}={name}")
        if not fault and option in given:
            fault = f": {option} is given twice. Give it once."
        if fault:
            faults.append(f"{item.input_line}{fault}")
            continue
        given[option] = value
        texts[f"{key}.{option}"] = (item.input_line or "").partition("=")[2]
    values = {**values, **given}
    origins = {**composed.origins, **dict.fromkeys(texts, "command line")}
    made, wrong = build_instance(cls, values, key, Composed({key: values}, origins, texts))
    if faults or wrong:
        raise ConfigError(*faults, *wrong)
    return made


def _place(composed: Composed, kind: str, key: str) -> Composed:
    """Return the values of ``kind`` at ``key``, where the user sets them."""
    origins = {}
    for name, origin in composed.origins.items():
        origins[key + name.removeprefix(kind)] = origin
    return Composed({key: composed.values[kind]}, origins)


def _describe_unknown(option: str, choice: str, allowed: list[str]) -> str:
    """Return the end of a sentence about an option that the class does not have."""
    hint = " It has none."
    if allowed:
        hint = f"{suggest_nearest(option, allowed)} There is: {', '.join(allowed)}."
    return f" is not an option of {choice}.{hint}"


def _read_value(item: Any, option: str, cls: type, allowed: list[str], choice: str) -> tuple[Any, str | None]:
    """Return the value of a parsed word, and what is wrong with the word, as the end of a sentence."""
    if option not in allowed:
        return None, _describe_unknown(option, choice, allowed)
    text = (item.input_line or "").partition("=")[2]
    if get_origin(get_type_hints(cls)[option]) is tuple and not text.startswith("["):
        return parse_override(f"{option}=[{text}]").value(), None
    if item.is_sweep_override():
        return None, f": {option} takes one value here. Give one."
    return item.value(), None
