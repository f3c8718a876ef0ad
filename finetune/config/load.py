"""From YAML groups and ``key=value`` overrides to one checked ``Config``; with ``grammar`` the only module that knows Hydra and OmegaConf.

An override either chooses an option of a group (a folder of YAML files) or sets a value. Hydra composes the chosen files; the values
are laid on top; ``strict`` checks the whole. Every fault found on the way is raised together.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_repository import CachingConfigRepository  # reads each file once: half the time
from hydra._internal.defaults_list import (
    create_defaults_list,  # no public way lists the files of a composition
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import registry
from ..errors import ConfigError, near
from ..system import safe
from . import groups, later, plugins, references, strict
from .grammar import ALIASES, PLACED, parsed, unlisted
from .groups import conf_dir as conf_dir  # part of what this module offers
from .origins import flat, leaves, yaml_origins
from .settings import Config
from .strict import Composed

COMMAND_LINE = "command line"
# Keys that no value may be given to, since the name follows from the choice of an option.
NAMES = [
    f"{kind.place}.name" for kind in (*registry.sections(), *registry.nested().values()) if not kind.unnamed
]


def load(overrides: list[str], config_dir: Path | None = None, config_file: Path | None = None) -> Config:
    """The checked configuration of one run.

    ``config_dir``: the user's own groups, which win over the built-in options of the same name.
    ``config_file``: a run's frozen configuration, on which only values can be changed. Raises ``ConfigError`` with all faults.
    """
    return _resolve(overrides, config_dir, config_file)[0]


def tree(
    overrides: list[str], config_dir: Path | None = None, config_file: Path | None = None
) -> dict[str, tuple[Any, str]]:
    """Every resolved value by dotted key, with where it came from; arguments and faults as in ``load``."""
    config, composed = _resolve(overrides, config_dir, config_file)
    return leaves(config, composed.origins)


def expand(overrides: list[str], config_dir: Path | None = None, most: int = 100_000) -> list[list[str]]:
    """The cross product of all sweeps (``a,b``, ``choice(...)``, ``range(...)``, ``glob(...)``), in the order written: 1 to ``most`` points."""
    plugins.load()
    _options(config_dir)  # stores the options that have no file
    (items, faults), choices = parsed(overrides), list[list[str]]()
    for item in items:
        try:
            item.config_loader = _loader(*groups.roots(config_dir))
            if fault := unlisted(item, most):
                faults.append(fault)
                continue
            values = (
                list(islice(item.sweep_string_iterator(), most + 1)) if item.is_sweep_override() else None
            )
            choices.append(
                [str(item.input_line)]
                if values is None
                else [f"{item.key_or_group}={value}" for value in values]
            )
            if not choices[-1]:
                faults.append(
                    f"{item.input_line} names no value at all, so the grid is empty. Write key=a,b or range(0,5); range(5,0,-1) counts down."
                )
        except (HydraException, OmegaConfBaseException) as error:
            faults.append(f"{item.input_line}: {error}. A sweep takes key=a,b or key=range(START,STOP,STEP).")
    if prod(map(len, choices)) > most:
        faults += [f"The grid has more than {most:,} points, more than can be listed. Sweep fewer values."]
    if faults:
        raise ConfigError(*faults)
    return [list(point) for point in product(*choices)]


def _resolve(
    overrides: list[str], config_dir: Path | None, config_file: Path | None
) -> tuple[Config, Composed]:
    plugins.load()
    options = _options(config_dir)
    if config_file and config_dir:
        raise ConfigError(
            "--config and --config-dir do not go together: a frozen configuration is complete and reads no groups."
        )
    request = _request(overrides, options, config_file)
    try:
        base = (
            _read(config_file)
            if config_file
            else _compose(tuple(sorted(request.chosen.items())), config_dir, groups.stamps(config_dir))
        )
        composed = _lay_on(base, request)
        config = strict.build(composed, skip=request.spoiled)
    except ConfigError as error:
        raise ConfigError(*request.faults, *error.faults) from None
    if request.faults:
        raise ConfigError(*request.faults)
    return config, composed


@dataclass
class _Request:
    """What the overrides ask for; ``spoiled`` are sections that need no look: mostly since their choice is itself wrong."""

    chosen: dict[str, str] = field(default_factory=dict)
    values: dict[str, Override] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)


def _request(overrides: list[str], options: dict[str, set[str]], config_file: Path | None) -> _Request:
    items, faults = parsed(overrides)
    request, seen = _Request(faults=faults), dict[str, str]()
    for item in items:
        key, text = item.key_or_group, str(item.input_line)
        fault = f"{seen[key]} and {text} set the same thing; keep one of them." if key in seen else None
        fault = fault or _fault_of(item, options, config_file)
        seen[key] = text
        if fault:
            request.faults.append(fault)
            request.spoiled |= {PLACED.get(key, key)} if key in options else set()
        elif key in options:
            request.chosen[key] = str(item.value())
        else:
            request.values[key] = item
    if request.faults:
        for kind in registry.sections():
            asked = any(key.startswith(f"{kind.place}.") for key in request.values)
            if kind.needs_torch and not asked:
                request.spoiled.add(kind.place)
    return request


def _fault_of(item: Override, options: dict[str, set[str]], config_file: Path | None) -> str | None:
    key, text, value = item.key_or_group, item.input_line, item.value()
    if isinstance(value, Sweep):
        cure = (
            "" if key in options else f" For a list write {key}=[...], for text with a comma '{key}=\"...\"'."
        )
        return f"{text} names several values; one run takes one, and `finetune sweep {text}` runs each.{cure}"
    if key in NAMES:
        return f"{text}: the name follows from the choice; write {key.split('.')[-2]}=OPTION."
    if key not in options:
        return None
    if config_file:
        return f"{text} cannot be combined with --config: a frozen configuration is complete, and only values in it can be changed."
    if isinstance(value, dict | list) or value is None:
        return f"{text}: {key} takes exactly one option (`finetune sweep {key}=A,B` runs several). Options: {', '.join(sorted(options[key]))}."
    if str(value) not in options[key]:
        return f"{text} is not an option ({COMMAND_LINE}).{near(str(value), options[key])} Options: {', '.join(sorted(options[key]))}."
    return None


def _options(config_dir: Path | None) -> dict[str, set[str]]:
    """Return the options of each group: the names of YAML files, and of classes of plug-ins, which need no file."""
    if config_dir and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder.")
    found: dict[str, set[str]] = {}
    for file in groups.yaml_files(config_dir):
        if file.parent not in (conf_dir(), config_dir) and file.parent.name not in (
            *strict.ROOT,
            *ALIASES,
            *registry.outside_runs(),
        ):
            found.setdefault(file.parent.name, set()).add(file.stem)
    for kind in (*registry.sections(), *registry.nested().values()):
        without_file = plugins.names(kind.name) - found.get(kind.name, set())
        _offer_to_hydra(kind.name, without_file)
        found.setdefault(kind.name, set()).update(without_file)
    return found


def _offer_to_hydra(group: str, names: Iterable[str]) -> None:
    """Make ``names`` the options of ``group`` that Hydra finds without a file: each stands for ``name: NAME``."""
    store = ConfigStore.instance()
    store.repo[group] = {}  # of an earlier call: a file of the same name may be there by now
    for name in names:
        store.store(group=group, name=name, node={"name": name})


@cache
def _loader(first: Path, *others: Path) -> Any:
    """Return Hydra's config loader over folders of groups, in which an earlier folder wins.

    ``hydra.compose`` would merge Hydra's own configuration, too, which takes five times as long.
    """
    with initialize_config_dir(str(first.resolve()), version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
    search_path = loader.get_search_path()
    for number, folder in enumerate(others):
        after = SearchPathQuery(provider=f"groups {number - 1}" if number else "main", path=None)
        search_path.append(f"groups {number}", f"file://{folder.resolve()}", anchor=after)
    loader.repository.initialize_sources(search_path)
    return loader


@lru_cache(maxsize=64)  # the points of a sweep differ mostly in values
def _compose(
    chosen: tuple[tuple[str, str], ...], config_dir: Path | None, stamps: tuple[tuple[str, int], ...]
) -> Composed:
    """The chosen files merged in the order of the defaults list, with the line that set each key. ``stamps`` only tell cached results apart."""
    groups.check(config_dir)
    loader = _loader(*groups.roots(config_dir))
    # a group of the user's that the defaults list does not know is appended to it
    picks = [
        f"{'' if g in strict.SECTIONS else '+'}{g}={QuotedString(o, Quote.double).with_quotes()}"
        for g, o in chosen
    ]
    overrides = OverridesParser.create().parse_overrides(picks)
    repository = CachingConfigRepository(loader.repository)
    origins: dict[str, str] = {}
    try:
        # ``compose`` would merge Hydra's own configuration too, which costs five times as much and is of no use here
        defaults = create_defaults_list(
            repository, "config", overrides, prepend_hydra=False, skip_missing=False
        ).defaults
        config = loader._compose_config_from_defaults_list(defaults, repository)
        for default in defaults:
            found = repository.load_config(default.config_path or "")
            if found and found.path.startswith("file://"):
                file = Path(found.path.removeprefix("file://")) / f"{default.config_path}.yaml"
                origins |= yaml_origins(
                    file.read_text(), groups.label(file, config_dir), default.package or ""
                )
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_composing_fault(error)) from None
    composed = Composed(later.enter(_plain(config, resolve=False), sections_only=True), origins)
    for group, place in PLACED.items():
        composed = _placed(composed, group, place)
    return composed


def _placed(composed: Composed, group: str, place: str) -> Composed:
    """The values of ``group`` moved to their ``place``; where they name a choice, nothing of what was there remains."""
    section, _, name = place.partition(".")
    around, part = composed.values.get(section), composed.values.get(group)
    if not isinstance(around, dict) or not isinstance(part, dict):
        return composed
    old = around.get(name) if "name" not in part else None
    values = {key: value for key, value in composed.values.items() if key != group}
    values[section] = {**around, name: {**(old if isinstance(old, dict) else {}), **part}}
    gone = (group, *([place] if old is None else []))
    origins = {
        key: line
        for key, line in composed.origins.items()
        if not f"{key}.".startswith(tuple(f"{start}." for start in gone))
    }
    moved = {
        place + key.removeprefix(group): line
        for key, line in composed.origins.items()
        if f"{key}.".startswith(f"{group}.")
    }
    return replace(composed, values=values, origins=origins | moved)


def _composing_fault(error: Exception) -> str:
    """Hydra's words on one line, with the reason that it keeps in the cause."""
    said = [str(e) for e in (error, error.__cause__) if e]
    return f"The YAML files do not fit together: {' '.join(' '.join(said).split())}"


def _read(file: Path) -> Composed:
    """A frozen configuration."""
    if file.is_dir():
        raise ConfigError(
            f"--config {file} is a folder; a run's frozen configuration is the file {file / 'config.yaml'}."
        )
    if not file.is_file():
        raise ConfigError(f"--config {file}: there is no such file.")
    if newer := safe.too_new(file, safe.first_line(file)):
        raise ConfigError(f"{newer}.")
    try:
        text = safe.yaml_text(file)
        config = OmegaConf.load(io.StringIO(text))
        plugins.check(file, text)
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"--config {file} is not a mapping of settings.")
        return _with_later(Composed(_plain(config, resolve=False), yaml_origins(text, str(file))), file)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"--config {file} cannot be read as YAML: {' '.join(str(error).split())}") from None


def _with_later(composed: Composed, file: Path) -> Composed:
    """Enter the settings that the frozen configuration ``file`` lacks because they came later."""
    values = later.enter(composed.values)
    before, origins = dict(_leaves(composed.values)), dict(composed.origins)
    for key, _ in _leaves(values):
        if key not in before:
            origins[key] = f"not in {file}, so as before the setting came"
    return replace(composed, values=values, origins=origins)


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in values.items():
        yield from flat(value, section)


def _plain(config: Any, resolve: bool) -> dict[str, Any]:
    """The values as plain Python; ``${...}`` stays as text unless ``resolve``."""
    try:
        return dict(OmegaConf.to_container(config, resolve=resolve, throw_on_missing=False))  # type: ignore[arg-type]  # a mapping
    except OmegaConfBaseException as error:
        raise ConfigError(_composing_fault(error)) from None


def _lay_on(base: Composed, request: _Request) -> Composed:
    """``base`` with the values of the command line on top; those of spoiled sections are left out."""
    config, origins = OmegaConf.create(base.values), dict(base.origins)
    for key, item in request.values.items():
        if any(key == spoiled or key.startswith(f"{spoiled}.") for spoiled in request.spoiled):
            continue
        try:
            OmegaConf.update(config, key, item.value(), merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            request.faults.append(f"{item.input_line} cannot be set: {' '.join(str(error).split())}")
        origins |= {name: COMMAND_LINE for name, _ in flat(item.value(), key)}
    if faults := references.faults(_plain(config, resolve=False), origins):
        raise ConfigError(*faults)
    texts = {key: item.get_value_string() for key, item in request.values.items()}
    return replace(base, values=_plain(config, resolve=True), origins=origins, texts=texts)
