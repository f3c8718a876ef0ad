"""The strict pass: from plain nested values to a ``Config``, or every fault at once, each with its value and origin.

Nothing is converted silently: the only liberties are a whole number for a float field, a list for a tuple, and a bare number on the
command line for a text field.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache, partial
from itertools import islice
from typing import Any, get_type_hints

import pydantic

from .. import registry
from ..errors import ConfigError, near
from .origins import flat, origin_of
from .settings import Config

CHOSEN = {kind.place: kind for kind in registry.sections()}  # sections whose class is chosen by ``name``
NESTED = {kind.name: kind for kind in registry.nested().values()}  # likewise, for mappings inside a section
WORDS = {
    "a valid array": "a list, written [a,b]",
    "an object": "a mapping",
    "a valid boolean": "true or false",
    "Field required": "too few entries",
}
MOST = 50  # wrong settings of a section that are told of one by one
ROOT = tuple(f.name for f in fields(Config) if f.name in ("name", "run", "seed"))
SECTIONS = tuple(f.name for f in fields(Config) if f.name not in ROOT)


@dataclass(frozen=True)
class Composed:
    """Plain nested values; the origin of each dotted key; the raw text of values given on the command line."""

    values: dict[str, Any]
    origins: dict[str, str]
    texts: dict[str, str] = field(default_factory=dict)


def build(composed: Composed, skip: Iterable[str] = ()) -> Config:
    """The checked configuration. Sections in ``skip`` are already known to be wrong and are not looked at.

    Raises ``ConfigError`` with every fault found.
    """
    root = {key: value for key, value in composed.values.items() if key not in SECTIONS}
    parts, faults = _check(Config, ROOT, root, "", composed)
    for section in [s for s in SECTIONS if s not in skip]:
        parts[section], found = _section(section, composed)
        faults += found
    if faults or skip:
        raise ConfigError(*faults)
    config = Config(**parts)
    if faults := [*config.method.faults(config.train.steps), *config.selector.faults(config.train.steps)]:
        raise ConfigError(*faults)
    return config


def _section(section: str, composed: Composed) -> tuple[Any, list[str]]:
    """One section as an instance of its class, or None and its faults."""
    values = composed.values.get(section)
    if not isinstance(values, dict):
        return None, [_no_mapping(section, section, values, composed)]
    try:
        cls, given = _class_of(section, values, composed)
    except ConfigError as error:
        return None, list(error.faults)
    return _instance(cls, cls, given, section, composed)


def _instance(
    cls: type, make: Callable[..., Any], given: dict[str, Any], section: str, composed: Composed
) -> tuple[Any, list[str]]:
    """What ``make`` makes of the checked values for ``cls``, or None and the faults: of fields, nested ones too, or of the values together."""
    nested = _nested(cls)
    wanted = tuple(f.name for f in fields(cls) if f.init and f.name not in nested)
    parts, faults = _check(
        cls, wanted, {key: value for key, value in given.items() if key not in nested}, section, composed
    )
    for name, (item, kind) in nested.items():
        try:
            parts[name], found = _instance(
                *_inner(item, kind, f"{section}.{name}", composed), f"{section}.{name}", composed
            )
            faults += found
        except ConfigError as error:
            faults += error.faults
    if faults:
        return None, faults
    try:
        return make(**parts), []
    except ValueError as error:
        return None, [f"{_what(section, cls)}: {error}"]


def _nested(cls: type) -> dict[str, tuple[Field[Any], str]]:
    """Return, by name, the fields of ``cls`` that are annotated with the base class of a nested kind, and the kind."""
    hints, found = get_type_hints(cls), {}
    for item in fields(cls):
        kind = vars(hints[item.name]).get("KIND") if isinstance(hints[item.name], type) else None
        if kind in NESTED:
            found[item.name] = (item, kind)
    return found


def _inner(
    item: Field[Any], kind: str, key: str, composed: Composed
) -> tuple[type, Callable[..., Any], dict[str, Any]]:
    """The class in a nested field, what makes its instance, and the values for it: without a ``name`` they change the field's default."""
    values = _value(key.rpartition(".")[0], composed).get(item.name, "???" if _is_required(item) else {})
    if values == "???":
        raise ConfigError(f"{key} is not set. Add {kind}=OPTION.")
    if not isinstance(values, dict):
        raise ConfigError(_no_mapping(key, kind, values, composed))
    if "name" in values or _is_required(item):
        cls, given = _chosen(kind, values, key, composed)
        return cls, cls, given
    default: Any = item.default_factory() if item.default_factory is not MISSING else item.default
    return type(default), partial(replace, default), values


def _no_mapping(key: str, choice: str, value: Any, composed: Composed) -> str:
    origin = composed.origins.get(key, "")
    return f"{key} should be a mapping of settings, not {value!r}{origin and f' ({origin})'}. Choose one by {choice}=OPTION."


def _class_of(section: str, values: dict[str, Any], composed: Composed) -> tuple[type, dict[str, Any]]:
    """The dataclass of a section, and its values without the name that chose the class."""
    if section in CHOSEN:
        return _chosen(section, values, section, composed)
    return get_type_hints(Config)[section], values


def _chosen(kind: str, values: dict[str, Any], key: str, composed: Composed) -> tuple[type, dict[str, Any]]:
    """The registered class that ``values`` name, and the other values. Raises ``ConfigError`` where there is none."""
    name = values.get("name", registry.KINDS[kind].unnamed)
    if not isinstance(name, str):
        raise ConfigError(
            f"{key}.name is not set. Its file must say which {kind} it is, one of: {', '.join(registry.catalog(kind))}."
        )
    try:
        cls: Any = registry.get(kind, name)
    except ConfigError as error:
        raise ConfigError(f"{error} ({composed.origins.get(f'{key}.name', key)})") from None
    former = getattr(cls, "former", {})
    given = {}
    for setting, value in values.items():
        if setting != "name" and not (setting in former and value == former[setting]):
            given[setting] = value
    return cls, given


def _what(section: str, cls: type) -> str:
    """``method=lora``, ``schedule=grow``; for a section without a choice of classes its name."""
    leaf = section.rpartition(".")[2]
    return f"{leaf}={cls.name}" if leaf in (*CHOSEN, *NESTED) else leaf  # type: ignore[attr-defined]  # registered, so it has a name


@cache
def _schema(cls: type, wanted: tuple[str, ...]) -> type[pydantic.BaseModel]:
    """A strict model of the ``wanted`` fields of a dataclass; field names are aliased, since some clash with pydantic's own."""
    hints = get_type_hints(cls, include_extras=True)
    required = {f.name: f for f in fields(cls) if f.name in wanted}
    made: dict[str, Any] = {
        f"x_{n}": (hints[n], pydantic.Field(... if _is_required(f) else None, alias=n))
        for n, f in required.items()
    }
    config = pydantic.ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    return pydantic.create_model(cls.__name__, __config__=config, **made)


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _check(
    cls: type, wanted: tuple[str, ...], values: dict[str, Any], section: str, composed: Composed
) -> tuple[dict[str, Any], list[str]]:
    """The values that were given, in the types of ``cls``, and the faults."""
    given = {key: value for key, value in values.items() if value != "???"}
    try:
        model = _schema(cls, wanted).model_validate_json(json.dumps(given, default=str))
        parts = {name[2:]: getattr(model, name) for name in model.model_fields_set}
        return parts, _unknown_names(parts, cls, section, composed)
    except pydantic.ValidationError as error:
        errors: list[Any] = error.errors(include_url=False)
    as_text = {e["loc"][0]: text for e in errors if (text := _text_of(e, section, composed)) is not None}
    if as_text:
        return _check(cls, wanted, {**values, **as_text}, section, composed)
    return {}, _faults(errors, cls, section, composed)


def _unknown_names(parts: dict[str, Any], cls: type, section: str, composed: Composed) -> list[str]:
    """Return a fault for each setting that must be the name of a registered class and is not."""
    hints, found = get_type_hints(cls, include_extras=True), list[str]()
    for name, value in parts.items():
        for mark in getattr(hints[name], "__metadata__", ()):
            if isinstance(mark, registry.Named) and value not in registry.catalog(mark.kind):
                known = registry.catalog(mark.kind)
                given = _given(_dotted(section, (name,)), value, composed)
                found.append(
                    f"{given} is not a {mark.kind}.{near(value, known)} There is: {', '.join(known)}."
                )
    return found


def _text_of(error: Any, section: str, composed: Composed) -> str | None:
    """What was typed, where a text field got a bare number on the command line: ``run=7``."""
    bare = (
        error["type"] == "string_type" and len(error["loc"]) == 1 and isinstance(error["input"], int | float)
    )
    return composed.texts.get(_dotted(section, error["loc"])) if bare else None


def _faults(errors: list[Any], cls: type, section: str, composed: Composed) -> list[str]:
    """One sentence for each wrong key; the branches of a union share one."""
    by_key: dict[str, list[Any]] = {}
    for error in errors:
        inside = _inside(error["loc"], _value(section, composed))
        by_key.setdefault(_dotted(section, inside), []).append(error)
    said = [
        fault
        for key, found in islice(by_key.items(), MOST)
        for fault in _fault(key, found, cls, section, composed)
    ]
    return said + (
        [f"{len(by_key) - MOST:,} more settings of {section or 'the run'} are wrong."]
        if len(by_key) > MOST
        else []
    )


def _inside(loc: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """The part of pydantic's location that names something in the input; the rest are branches of unions."""
    for depth, step in enumerate(loc):
        known = (
            step in value
            if isinstance(value, dict)
            else isinstance(value, list) and isinstance(step, int) and step < len(value)
        )
        if depth and not known:
            return loc[:depth]
        value = value[step] if known else None
    return loc


def _dotted(section: str, loc: tuple[Any, ...]) -> str:
    return ".".join([*([section] if section else []), *map(str, loc)])


def _fault(key: str, errors: list[Any], cls: type, section: str, composed: Composed) -> list[str]:
    kind, value = errors[0]["type"], errors[0]["input"]
    if kind == "missing" and len(errors[0]["loc"]) == 1:
        return [f"{key} is not set{_origin(key, composed, ' ({} leaves it open)')}. Add {key}=VALUE."]
    if kind == "extra_forbidden":
        of = f" of {_what(section, cls)}" if section else ""
        if section in CHOSEN and (nested := key.rpartition(".")[2]) in NESTED:
            choice = value.get("name") if isinstance(value, dict) else None
            whats = (
                [f"{nested}={choice}"] if choice else [_given(*item, composed) for item in flat(value, key)]
            )
            return [
                f"{what} is not a setting{of}, which has no {nested}. Leave it out, or choose a {section} that has one."
                for what in whats
            ]
        return [
            f"{_given(full, leaf, composed)} is not a setting{of}.{_suggestion(full, composed)}"
            for full, leaf in flat(value, key)
        ]
    whys = dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in errors)
    should = (
        ""
        if any(why.startswith(("Tuple", "List", "Field", "Dict", "Value")) for why in whys)
        else " should be"
    )
    return [
        f"{_given(key, _value(key, composed), composed)}{should or ':'} {' or '.join(WORDS.get(why, why) for why in whys)}."
    ]


def _value(key: str, composed: Composed) -> Any:
    value: Any = composed.values
    for step in key.split(".") if key else ():
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def _given(key: str, value: Any, composed: Composed) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return f"{key}={text if len(text) <= 80 else text[:77] + '...'}{_origin(key, composed, ' ({})')}"


def _origin(key: str, composed: Composed, form: str) -> str:
    inner = (origin for name, origin in composed.origins.items() if name.startswith(f"{key}."))
    origin = origin_of(key, composed.origins) or next(inner, None)
    return form.format(origin) if origin else ""


def _suggestion(key: str, composed: Composed) -> str:
    """The nearest setting beside ``key``, else anywhere in the tree, else what there is."""
    known = [*ROOT, *SECTIONS, *(full for section in SECTIONS for full in _settings(section, composed))]
    parent, _, leaf = key.rpartition(".")
    beside = [full for full in known if full.rpartition(".")[0] == parent]
    if not beside and (parent in SECTIONS or parent.rpartition(".")[2] in NESTED):
        return " It has none."
    for pool in (beside, known):
        names = difflib.get_close_matches(leaf, [full.rpartition(".")[2] for full in pool], n=1, cutoff=0.6)
        if names:
            best = difflib.get_close_matches(
                key, [full for full in pool if full.rpartition(".")[2] == names[0]], n=1, cutoff=0
            )
            return f" Did you mean {best[0]!r}?"
    return f" There is: {', '.join(beside or [*ROOT, *SECTIONS])}."


def _settings(section: str, composed: Composed) -> list[str]:
    """The dotted settings of a section, none when its choice is itself a fault."""
    try:
        cls, _ = _class_of(section, composed.values[section], composed)
    except (ConfigError, KeyError, AttributeError):
        return []
    found = [f"{section}.{f.name}" for f in fields(cls) if f.init]
    for name, (item, kind) in _nested(cls).items():
        with suppress(ConfigError):
            inner, _, _ = _inner(item, kind, f"{section}.{name}", composed)
            found += [f"{section}.{name}.{f.name}" for f in fields(inner) if f.init]
    return found
