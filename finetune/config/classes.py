"""Find the dataclass of each part of a configuration, by its section or by the name that it states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, fields, replace
from functools import partial
from typing import Any

from .. import registry
from ..errors import ConfigError
from ..system.hints import read_hints
from .composed import Composed
from .settings import Config

CHOSEN = {kind.place: kind for kind in registry.sections()}  # sections whose class is chosen by ``name``
NESTED = {kind.name: kind for kind in registry.nested().values()}  # likewise, for mappings inside a section
OUTSIDE_SECTIONS = ("name", "run", "seed")
# Sections that are fields of ``Config``, and sections of all other kinds, which it holds in ``others``.
TYPED_SECTIONS = tuple(item.name for item in fields(Config) if item.name not in (*OUTSIDE_SECTIONS, "others"))
OTHER_SECTIONS = tuple(kind.name for kind in registry.top_level() if kind.name not in TYPED_SECTIONS)
SECTIONS = (*TYPED_SECTIONS, *OTHER_SECTIONS)
STREAMS = "streams"  # the section that holds a data set for each name
OPEN = "???"  # the value of a setting that a YAML file leaves to the user


def class_of_section(section: str, values: dict[str, Any], composed: Composed) -> tuple[type, dict[str, Any]]:
    """Return the dataclass of a section, and the section's values without the name that chose the class.

    Raises ``ConfigError`` if no registered class has that name.
    """
    if section in CHOSEN:
        return class_named_in(section, values, section, composed)
    if section in OTHER_SECTIONS:
        return registry.base_class(registry.KINDS[section]), values
    return read_hints(Config)[section], values


def class_named_in(
    kind: str, values: dict[str, Any], key: str, composed: Composed
) -> tuple[type, dict[str, Any]]:
    """Return the registered class that ``values``, which stand at ``key``, name; and the other values.

    Former settings that have their only value are left out. Raises ``ConfigError`` if there is no such class.
    """
    name = values.get("name", registry.KINDS[kind].unnamed)
    if not isinstance(name, str):
        known = ", ".join(registry.catalog(kind))
        raise ConfigError(f"{key}.name is not set. Its file must say which {kind} it is, one of: {known}.")
    try:
        cls: Any = registry.get(kind, name)
    except ConfigError as error:
        raise ConfigError(f"{error} ({composed.origins.get(f'{key}.name', key)})") from None
    former = getattr(cls, "former", {})
    given = {}
    for setting, value in values.items():
        is_former = setting in former and value == former[setting]
        if setting != "name" and not is_former:
            given[setting] = value
    return cls, given


def nested_fields(cls: type) -> dict[str, tuple[Field[Any], str]]:
    """Return the fields annotated with the base class of a nested kind, by name, each with its kind."""
    hints, found = read_hints(cls), {}
    for item in fields(cls):
        hint = hints[item.name]
        kind = vars(hint).get("KIND") if isinstance(hint, type) else None
        if kind in NESTED:
            found[item.name] = (item, kind)
    return found


def class_of_nested(
    item: Field[Any], kind: str, key: str, composed: Composed
) -> tuple[type, Callable[..., Any], dict[str, Any]]:
    """Return the class of a nested field, the function that makes its instance, and the values for it.

    Values without a ``name`` change the default of the field. Raises ``ConfigError`` if there is no class.
    """
    section = composed.at(key.rpartition(".")[0])
    values = section.get(item.name, OPEN if is_required(item) else {})
    if values == OPEN:
        raise ConfigError(f"{key} is not set. Add {kind}=OPTION.")
    if not isinstance(values, dict):
        raise ConfigError(not_a_mapping(key, kind, values, composed))
    if "name" in values or is_required(item):
        cls, given = class_named_in(kind, values, key, composed)
        return cls, cls, given
    default: Any = item.default
    if item.default_factory is not MISSING:
        default = item.default_factory()
    return type(default), partial(replace, default), values


def is_required(item: Field[Any]) -> bool:
    """Return whether a field has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def not_a_mapping(key: str, group: str, value: Any, composed: Composed) -> str:
    """Return the message for a plain value where settings must stand."""
    origin = composed.origins.get(key)
    where = f" ({origin})" if origin else ""
    return f"{key} should be a mapping of settings, not {value!r}{where}. Choose one by {group}=OPTION."


def known_settings(composed: Composed) -> list[str]:
    """Return the dotted keys of all settings that the chosen classes have."""
    found = [*OUTSIDE_SECTIONS, *SECTIONS]
    for section in SECTIONS:
        found += _settings_of(section, composed)
    return found


def _settings_of(section: str, composed: Composed) -> list[str]:
    """Return the dotted settings of a section; none if its choice is itself a fault."""
    try:
        if section == STREAMS:
            return _settings_of_streams(composed)
        cls, _ = class_of_section(section, composed.values[section], composed)
    except (ConfigError, KeyError, AttributeError):
        return []
    found = _keys(cls, section)
    for name, (item, kind) in nested_fields(cls).items():
        with suppress(ConfigError):
            inner, _, _ = class_of_nested(item, kind, f"{section}.{name}", composed)
            found += _keys(inner, f"{section}.{name}")
    return found


def _settings_of_streams(composed: Composed) -> list[str]:
    found = []
    for name, values in composed.values[STREAMS].items():
        key = f"{STREAMS}.{name}"
        cls, _ = class_named_in("dataset", values, key, composed)
        found += [key, *_keys(cls, key)]
    return found


def _keys(cls: Any, prefix: str) -> list[str]:
    return [f"{prefix}.{item.name}" for item in fields(cls) if item.init]
