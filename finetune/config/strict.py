"""Build a checked ``Config`` from plain nested values, or raise every fault at once.

Nothing is converted silently. Three conversions are made: a whole number for a float field, a list for a
tuple, and a bare number on the command line for a text field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache
from typing import Any

import pydantic

from .. import registry
from ..errors import ConfigError, suggest_nearest
from ..system.hints import read_hints
from .classes import (
    OPEN,
    OTHER_SECTIONS,
    OUTSIDE_SECTIONS,
    SECTIONS,
    STREAMS,
    class_named_in,
    class_of_nested,
    class_of_section,
    is_required,
    nested_fields,
    not_a_mapping,
)
from .composed import Composed as Composed  # part of what this module offers
from .faults import describe_errors, dotted, refuse, title_of
from .settings import Config

ALIAS = "x_"  # in front of a field's name in pydantic's model, since some names are pydantic's own


def build(composed: Composed, skip: Iterable[str] = ()) -> Config:
    """Return the checked configuration.

    Sections in ``skip`` are known to be wrong already and are not checked; with any, the function raises in
    the end. Raises ``ConfigError`` with every fault found.
    """
    outside = {key: value for key, value in composed.values.items() if key not in SECTIONS}
    parts, faults = _check_values(Config, OUTSIDE_SECTIONS, outside, "", composed)
    for section in SECTIONS:
        if section == STREAMS:
            parts[section], found = _build_streams(composed, skip)
            faults += found
        elif section not in skip:
            parts[section], found = _build_section(section, composed)
            faults += found
    if faults or skip:
        raise ConfigError(*faults)
    others = {section: parts.pop(section) for section in OTHER_SECTIONS}
    config = Config(**parts, others=others)
    for kind in registry.sections():
        faults += config.section(kind.name).faults(config.train.steps)
    for dataset in config.streams.values():
        faults += dataset.faults(config.train.steps)
    faults += _find_stream_faults(config)
    faults += config.optimizer.find_conflicts(config.method, config.train.clip)
    refuse(faults)
    return config


def _build_section(section: str, composed: Composed) -> tuple[Any, list[str]]:
    """Return a section as an instance of its class, or None and its faults."""
    values = composed.values.get(section)
    if not isinstance(values, dict):
        return None, [not_a_mapping(section, section, values, composed)]
    try:
        cls, given = class_of_section(section, values, composed)
    except ConfigError as error:
        return None, list(error.faults)
    return build_instance(cls, given, section, composed)


def _build_streams(composed: Composed, skip: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the data set of each stream that is not in ``skip``, by the stream's name, and the faults."""
    values = composed.values.get(STREAMS)
    if not isinstance(values, dict):
        given = composed.describe(STREAMS, values)
        return {}, [f"{given} should be a mapping. Choose a data set for each by {STREAMS}.NAME=OPTION."]
    found: dict[str, Any] = {}
    faults: list[str] = []
    for name, given in values.items():
        key = f"{STREAMS}.{name}"
        if key in skip or STREAMS in skip:
            continue
        if not isinstance(given, dict):
            faults.append(not_a_mapping(key, key, given, composed))
            continue
        if "name" not in given:
            known = ", ".join(registry.catalog("dataset"))
            faults.append(f"{key} has settings and no data set. Choose one by {key}=OPTION, one of: {known}.")
            continue
        try:
            cls, settings = class_named_in("dataset", given, key, composed)
        except ConfigError as error:
            faults += error.faults
            continue
        found[name], wrong = build_instance(cls, settings, key, composed)
        faults += wrong
    return found, faults


def _find_stream_faults(config: Config) -> list[str]:
    """Return a fault for each stream that nothing uses, and for each that is needed and absent."""
    users: dict[str, str] = {}
    objectives = []
    for phase in config.method.phases():
        objectives.append(phase.objective or config.objective)
    for objective in objectives:
        for name in objective.streams():
            users[name] = f"objective={objective.name}"
    selector = config.section("selector")
    for name in selector.streams():
        users.setdefault(name, f"selector={selector.name}")
    faults = []
    for name, user in users.items():
        if name not in config.streams:
            faults.append(
                f"{user} needs the data stream {name}, and streams.{name} is not set. Choose its "
                f"data set, for example streams.{name}=jsonl streams.{name}.path=FILE."
            )
    chosen, verb = f"objective={config.objective.name}", "uses"
    if selector.streams():
        chosen, verb = f"{chosen} and selector={selector.name}", "use"
    for name in config.streams:
        if name not in users:
            used = f"only {', '.join(users)}" if users else "no data stream"
            faults.append(
                f"streams.{name}={config.streams[name].name} has no effect with {chosen}, which {verb} "
                f"{used}. Leave it out."
            )
    for objective in objectives:
        faults += _find_best_faults(objective, config)
    return faults


def _find_best_faults(objective: Any, config: Config) -> list[str]:
    """Return a fault if the best state is to be kept with an objective for which there is none."""
    if objective.keeps_best or config.train.select == "last":
        return []
    return [
        "train.select=best keeps the state that is best on validation, which with "
        f"objective={objective.name} is not the best of the run. Set train.select=last."
    ]


def build_instance(cls: type, given: dict[str, Any], key: str, composed: Composed) -> tuple[Any, list[str]]:
    """Return an instance of ``cls`` with the checked values ``given`` of ``key``, and the faults.

    The instance is None if there are faults.
    """
    return _build_instance(cls, cls, given, key, composed)


def _build_instance(
    cls: type, make: Callable[..., Any], given: dict[str, Any], key: str, composed: Composed
) -> tuple[Any, list[str]]:
    """Return what ``make`` makes of the checked values for ``cls``, or None and the faults.

    Faults are those of single fields, of nested instances, and of the values together.
    """
    nested = nested_fields(cls)
    wanted = tuple(item.name for item in fields(cls) if item.init and item.name not in nested)
    plain = {name: value for name, value in given.items() if name not in nested}
    parts, faults = _check_values(cls, wanted, plain, key, composed)
    for name, (item, kind) in nested.items():
        inner = f"{key}.{name}"
        try:
            inner_cls, inner_make, inner_given = class_of_nested(item, kind, inner, composed)
        except ConfigError as error:
            faults += error.faults
            continue
        parts[name], found = _build_instance(inner_cls, inner_make, inner_given, inner, composed)
        faults += found
    if faults:
        return None, faults
    try:
        return make(**parts), []
    except ValueError as error:
        return None, [f"{title_of(key, cls)}: {error}"]


def _check_values(
    cls: type, wanted: tuple[str, ...], values: dict[str, Any], section: str, composed: Composed
) -> tuple[dict[str, Any], list[str]]:
    """Return the given values in the types of the ``wanted`` fields of ``cls``, and the faults."""
    given = {name: value for name, value in values.items() if value != OPEN}
    try:
        model = _model(cls, wanted).model_validate_json(json.dumps(given, default=str))
    except pydantic.ValidationError as error:
        errors: list[Any] = error.errors(include_url=False)
        typed = _typed_texts(errors, section, composed)
        if typed:
            return _check_values(cls, wanted, {**values, **typed}, section, composed)
        return {}, describe_errors(errors, cls, section, composed)
    parts = {name.removeprefix(ALIAS): getattr(model, name) for name in model.model_fields_set}
    return parts, _unknown_names(parts, cls, section, composed)


@cache
def _model(cls: type, wanted: tuple[str, ...]) -> type[pydantic.BaseModel]:
    """Return a strict pydantic model of the ``wanted`` fields of a dataclass."""
    hints = read_hints(cls)
    made: dict[str, Any] = {}
    for item in fields(cls):
        if item.name in wanted:
            default = ... if is_required(item) else None
            made[ALIAS + item.name] = (hints[item.name], pydantic.Field(default, alias=item.name))
    rules = pydantic.ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    return pydantic.create_model(cls.__name__, __config__=rules, **made)


def _typed_texts(errors: list[Any], section: str, composed: Composed) -> dict[str, str]:
    """Return what was typed for text fields that got a bare number on the command line, as in ``run=7``."""
    found = {}
    for error in errors:
        is_number = error["type"] == "string_type" and isinstance(error["input"], int | float)
        text = composed.texts.get(dotted(section, error["loc"]))
        if is_number and len(error["loc"]) == 1 and text is not None:
            found[error["loc"][0]] = text
    return found


def _unknown_names(parts: dict[str, Any], cls: type, section: str, composed: Composed) -> list[str]:
    """Return a fault for each setting that must be the name of a registered class and is not."""
    hints, faults = read_hints(cls), []
    for name, value in parts.items():
        for mark in getattr(hints[name], "__metadata__", ()):
            if not isinstance(mark, registry.Named):
                continue
            known = registry.catalog(mark.kind)
            if value not in known:
                given = composed.describe(dotted(section, (name,)), value)
                hint = f"{suggest_nearest(value, known)} There is: {', '.join(known)}."
                faults.append(f"{given} is not a {mark.kind}.{hint}")
    return faults
