"""Read ``key=value`` overrides, YAML groups and frozen configurations, and return one checked ``Config``.

An override either chooses an option of a group (a folder of YAML files) or sets a value. ``compose`` merges
the chosen files, the values are laid on top, and ``strict`` checks the whole. All faults found on the way are
raised together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import registry
from ..errors import ConfigError, suggest_nearest
from . import plugins, references, strict
from .compose import compose, config_loader, find_options, read_frozen, to_plain
from .composed import Composed
from .faults import refuse
from .grammar import PLACED, STREAM, group_of, parse_all, refuse_endless
from .groups import conf_dir as conf_dir  # also offered by this module
from .origins import flat, leaves
from .settings import Config

COMMAND_LINE = "command line"
MOST_POINTS = 100_000  # of a grid that is listed


def load(overrides: list[str], config_dir: Path | None = None, config_file: Path | None = None) -> Config:
    """Return the checked configuration of one run.

    ``config_dir``: the user's own groups, which win over built-in options of the same name.
    ``config_file``: a run's frozen configuration, in which only values can be changed.
    Raises ``ConfigError`` with all faults.
    """
    return _resolve(overrides, config_dir, config_file)[0]


def tree(
    overrides: list[str], config_dir: Path | None = None, config_file: Path | None = None
) -> dict[str, tuple[Any, str]]:
    """Return every resolved value by dotted key, with its origin; arguments and faults as in ``load``."""
    config, composed = _resolve(overrides, config_dir, config_file)
    return leaves(config, composed.origins)


def expand(overrides: list[str], config_dir: Path | None = None, most: int = MOST_POINTS) -> list[list[str]]:
    """Return the points of a sweep, each a list of overrides: the cross product of all values, in order.

    Several values are written ``a,b``, ``choice(...)``, ``range(...)`` or ``glob(...)``. There is at least
    one point. Raises ``ConfigError`` where values cannot be listed, or there would be more than ``most``
    points.
    """
    plugins.load()
    find_options(config_dir)  # offers names of plug-ins to Hydra, for glob(...)
    items, faults = parse_all(overrides)
    choices: list[list[str]] = []
    for item in items:
        try:
            item.config_loader = config_loader(config_dir)
            refuse_endless(item, most)
            values = _list_values(item, most)
        except ConfigError as error:
            faults += error.faults
            continue
        except (HydraException, OmegaConfBaseException) as error:
            faults.append(f"{item.input_line}: {error}. A sweep takes key=a,b or key=range(START,STOP,STEP).")
            continue
        choices.append(values)
        if not values:
            faults.append(
                f"{item.input_line} names no value at all, so the grid is empty. Write key=a,b or "
                "range(0,5); range(5,0,-1) counts down."
            )
    if prod(map(len, choices)) > most:
        faults.append(f"The grid has more than {most:,} points, more than can be listed. Sweep fewer values.")
    refuse(faults)
    return [list(point) for point in product(*choices)]


def _list_values(item: Override, most: int) -> list[str]:
    """Return an override for each of the values of ``item``, at most one more than ``most``."""
    if not item.is_sweep_override():
        return [str(item.input_line)]
    return [f"{item.key_or_group}={value}" for value in islice(item.sweep_string_iterator(), most + 1)]


@dataclass
class _Request:
    """What the overrides ask for: options of groups, values by key, and faults.

    ``spoiled``: sections that are not checked, because the choice of their option is already known to be
    wrong, or because importing their classes is slow.
    """

    chosen: dict[str, str] = field(default_factory=dict)
    values: dict[str, Override] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)


def _resolve(
    overrides: list[str], config_dir: Path | None, config_file: Path | None
) -> tuple[Config, Composed]:
    """Return the checked configuration, and the values that it was built from."""
    plugins.load()
    options = find_options(config_dir)
    if config_file and config_dir:
        raise ConfigError(
            "--config and --config-dir do not go together: a frozen configuration is complete and reads no "
            "groups."
        )
    request = _read_request(overrides, options, config_file)
    try:
        base = read_frozen(config_file) if config_file else compose(request.chosen, config_dir)
        composed = _lay_on(base, request)
        config = strict.build(composed, skip=request.spoiled)
    except ConfigError as error:
        raise ConfigError(*request.faults, *error.faults) from None
    refuse(request.faults)
    return config, composed


def _read_request(overrides: list[str], options: dict[str, set[str]], config_file: Path | None) -> _Request:
    """Sort the overrides into choices and values, and collect their faults."""
    items, faults = parse_all(overrides)
    request, seen = _Request(faults=faults), dict[str, str]()
    for item in items:
        key, text = item.key_or_group, str(item.input_line)
        if key in seen:
            fault: str | None = f"{seen[key]} and {text} set the same thing; keep one of them."
        else:
            fault = _find_fault(item, options, config_file)
        seen[key] = text
        if fault:
            request.faults.append(fault)
            if group_of(key) in options:
                request.spoiled.add(PLACED.get(key, key))
        elif group_of(key) in options:
            request.chosen[key] = str(item.value())
        else:
            request.values[key] = item
    if request.faults:
        request.spoiled |= _slow_sections(request.values)
    return request


def _slow_sections(values: dict[str, Override]) -> set[str]:
    """Return the sections whose classes import torch and in which no value is set."""
    found = set()
    for kind in registry.sections():
        is_set = any(key.startswith(f"{kind.place}.") for key in values)
        if kind.needs_torch and not is_set:
            found.add(kind.place)
    return found


def _find_fault(item: Override, options: dict[str, set[str]], config_file: Path | None) -> str | None:
    """Return what is wrong with an override, if that can be told without checking its section."""
    key, text, value = item.key_or_group, item.input_line, item.value()
    group = group_of(key)
    if isinstance(value, Sweep):
        cure = ""
        if group not in options:
            cure = f" For a list write {key}=[...], for text with a comma '{key}=\"...\"'."
        return f"{text} names several values; one run takes one, and `finetune sweep {text}` runs each.{cure}"
    parent, _, leaf = key.rpartition(".")
    is_of_stream = leaf == "name" and STREAM.fullmatch(parent)
    if is_of_stream or key in _names_of_choices():
        return f"{text}: the name follows from the choice; write {key.split('.')[-2]}=OPTION."
    if group not in options:
        return None
    if config_file:
        return (
            f"{text} cannot be combined with --config: a frozen configuration is complete, and only values "
            "in it can be changed."
        )
    known = ", ".join(sorted(options[group]))
    if isinstance(value, dict | list) or value is None:
        several = f"`finetune sweep {key}=A,B` runs several"
        return f"{text}: {key} takes exactly one option ({several}). Options: {known}."
    if str(value) not in options[group]:
        hint = suggest_nearest(str(value), options[group])
        return f"{text} is not an option ({COMMAND_LINE}).{hint} Options: {known}."
    return None


def _names_of_choices() -> list[str]:
    """Return the keys that take no value, since the name follows from the choice of an option."""
    kinds = (*registry.sections(), *registry.nested().values())
    return [f"{kind.place}.name" for kind in kinds if not kind.unnamed]


def _lay_on(base: Composed, request: _Request) -> Composed:
    """Return ``base`` with the values of the command line on top; those of spoiled sections are left out."""
    config, origins = OmegaConf.create(base.values), dict(base.origins)
    for key, item in request.values.items():
        if any(f"{key}.".startswith(f"{section}.") for section in request.spoiled):
            continue
        try:
            OmegaConf.update(config, key, item.value(), merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            request.faults.append(f"{item.input_line} cannot be set: {' '.join(str(error).split())}")
        for name, _ in flat(item.value(), key):
            origins[name] = COMMAND_LINE
    refuse(references.find_faults(to_plain(config, resolve=False), origins))
    texts = {key: item.get_value_string() for key, item in request.values.items()}
    return replace(base, values=to_plain(config, resolve=True), origins=origins, texts=texts)
