"""Compose YAML files with Hydra, and read frozen configurations, into plain values with their origins."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_repository import CachingConfigRepository  # reads each file once: half the time
from hydra._internal.defaults_list import create_defaults_list  # no public way lists the composed files
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import registry
from ..errors import ConfigError
from ..system import safe
from . import groups, later, plugin_records, plugins
from .classes import OUTSIDE_SECTIONS, SECTIONS
from .composed import Composed
from .grammar import ALIASES, PLACED, STREAM
from .origins import flat, yaml_origins


def find_options(config_dir: Path | None) -> dict[str, set[str]]:
    """Return the options of each group: YAML files, and classes of plug-ins, which need no file."""
    found = _names_of_files(config_dir)
    for other in (*OUTSIDE_SECTIONS, *ALIASES, *registry.outside_runs()):
        found.pop(other, None)
    for kind in (*registry.sections(), *registry.nested().values()):
        without_file = plugins.names(kind.name) - found.get(kind.name, set())
        _offer_to_hydra(kind.name, without_file)
        found.setdefault(kind.name, set()).update(without_file)
    return found


def _names_of_files(config_dir: Path | None) -> dict[str, set[str]]:
    """Return the names of the YAML files of each group."""
    if config_dir and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder.")
    top = groups.roots(config_dir)
    found: dict[str, set[str]] = {}
    for file in groups.yaml_files(config_dir):
        if file.parent not in top:
            found.setdefault(file.parent.name, set()).add(file.stem)
    return found


def find_options_outside(group: str, config_dir: Path | None) -> list[str]:
    """Return the options of a group that is not part of a run's configuration, sorted."""
    return sorted(_names_of_files(config_dir).get(group, set()) | plugins.names(group))


def compose_outside(group: str, option: str, config_dir: Path | None) -> Composed:
    """Return the values of one option of such a group, under the group's name, with their origins.

    Raises ``ConfigError`` where a file cannot be read, may not be used, or sets anything else.
    """
    if option not in _names_of_files(config_dir).get(group, set()):  # a class of a plug-in needs no file
        return Composed({group: {"name": option}}, {})
    groups.check(config_dir)
    loader = config_loader(config_dir)
    repository = CachingConfigRepository(loader.repository)
    try:
        listed: Any = create_defaults_list(
            repository, f"{group}/{option}", [], prepend_hydra=False, skip_missing=False
        )
        config, origins = _merge_files(list(listed.defaults), loader, repository, config_dir)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_describe_misfit(error)) from None
    values = to_plain(config, resolve=True)
    if other := [key for key in values if key != group]:
        where = origins.get(other[0], f"{group}={option}")
        raise ConfigError(f"{where} sets {other[0]}, but a file of {group} can set only its own options.")
    found = values.get(group, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{group}={option}: its file should be a mapping of settings, not {found!r}.")
    return Composed({group: found}, origins)


def _offer_to_hydra(group: str, names: Iterable[str]) -> None:
    """Make ``names`` options of ``group`` that Hydra finds without a file; each stands for ``name: NAME``."""
    store = ConfigStore.instance()
    store.repo[group] = {}  # of an earlier call: a file of the same name may exist by now
    for name in names:
        store.store(group=group, name=name, node={"name": name})


def config_loader(config_dir: Path | None) -> Any:
    """Return Hydra's config loader over all folders of groups, in which the user's win."""
    return _config_loader(*groups.roots(config_dir))


@cache
def _config_loader(first: Path, *others: Path) -> Any:
    """Return Hydra's config loader over folders of groups, in which an earlier folder wins.

    ``hydra.compose`` would merge Hydra's own configuration, too, which takes five times as long.
    """
    with initialize_config_dir(str(first.resolve()), version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
    search_path, previous = loader.get_search_path(), "main"
    for number, folder in enumerate(others):
        name = f"groups {number}"
        after = SearchPathQuery(provider=previous, path=None)
        search_path.append(name, f"file://{folder.resolve()}", anchor=after)
        previous = name
    loader.repository.initialize_sources(search_path)
    return loader


def compose(chosen: dict[str, str], config_dir: Path | None) -> Composed:
    """Return the merged values of the defaults list and of the ``chosen`` option of each group.

    Raises ``ConfigError`` where files cannot be read, may not be used, or do not fit together.
    """
    return _compose(tuple(sorted(chosen.items())), config_dir, groups.stamps(config_dir))


@lru_cache(maxsize=64)  # the points of a sweep differ mostly in values
def _compose(
    chosen: tuple[tuple[str, str], ...], config_dir: Path | None, stamps: tuple[tuple[str, int], ...]
) -> Composed:
    """Do what ``compose`` does; another ``stamps`` makes the result another one in the cache."""
    groups.check(config_dir)
    loader = config_loader(config_dir)
    repository = CachingConfigRepository(loader.repository)
    try:
        picks, missing = [], _find_missing_groups([group for group, _ in chosen], repository)
        for group, option in chosen:
            added = "+" if group in missing else ""
            if STREAM.fullmatch(group):
                group = f"dataset@{group}"
            picks.append(f"{added}{group}={QuotedString(option, Quote.double).with_quotes()}")
        defaults = _list_defaults(picks, repository)
        config, origins = _merge_files(defaults, loader, repository, config_dir)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_describe_misfit(error)) from None
    composed = Composed(later.enter(to_plain(config, resolve=False), sections_only=True), origins)
    for group, place in PLACED.items():
        composed = _move(composed, group, place)
    return composed


def _merge_files(
    defaults: list[Any], loader: Any, repository: Any, config_dir: Path | None
) -> tuple[Any, dict[str, str]]:
    """Return the merged values of the files that ``defaults`` lists, and the origin of each dotted key."""
    # A public way, hydra.compose, would merge Hydra's own configuration, too.
    config = loader._compose_config_from_defaults_list(defaults, repository)
    origins: dict[str, str] = {}
    for default in defaults:
        found = repository.load_config(default.config_path or "")
        if found and found.path.startswith("file://"):
            file = Path(found.path.removeprefix("file://")) / f"{default.config_path}.yaml"
            label = groups.label(file, config_dir)
            origins |= yaml_origins(file.read_text(), label, default.package or "")
    return config, origins


def _list_defaults(picks: list[str], repository: Any) -> list[Any]:
    """Return the files that Hydra merges for overrides of the form ``group=option``, in their order."""
    overrides = OverridesParser.create().parse_overrides(picks)
    found: Any = create_defaults_list(
        repository, "config", overrides, prepend_hydra=False, skip_missing=False
    )
    return list(found.defaults)


def _find_missing_groups(chosen: list[str], repository: Any) -> set[str]:
    """Return the ``chosen`` groups that the defaults list lacks.

    They are groups of the user's, and kinds whose section may be absent.
    """
    missing = {group for group in chosen if group not in SECTIONS}  # among them every stream
    optional = [group for group in chosen if group in registry.KINDS and registry.KINDS[group].absent]
    if optional:
        listed = {default.config_path.rpartition("/")[0] for default in _list_defaults([], repository)}
        missing.update(group for group in optional if group not in listed)
    return missing


def _move(composed: Composed, group: str, place: str) -> Composed:
    """Move the values of ``group`` to the dotted key ``place``.

    Values that choose a class by ``name`` replace what stands there; others are merged into it.
    """
    section, _, name = place.partition(".")
    around, part = composed.values.get(section), composed.values.get(group)
    if not isinstance(around, dict) or not isinstance(part, dict):
        return composed
    old: Any = around.get(name)
    is_merged = "name" not in part and isinstance(old, dict)
    values = {key: value for key, value in composed.values.items() if key != group}
    values[section] = {**around, name: part}
    if is_merged:
        values[section][name] = {**old, **part}
    origins = {}
    for key, origin in composed.origins.items():
        replaced = not is_merged and f"{key}.".startswith(f"{place}.")
        if not replaced and not f"{key}.".startswith(f"{group}."):
            origins[key] = origin
    for key, origin in composed.origins.items():
        if f"{key}.".startswith(f"{group}."):
            origins[place + key.removeprefix(group)] = origin
    return replace(composed, values=values, origins=origins)


def read_frozen(file: Path) -> Composed:
    """Return the frozen configuration in ``file``, with the settings that came after it.

    Raises ``ConfigError`` where it cannot be read, or needs a later version or a plug-in that is not loaded.
    """
    if file.is_dir():
        inside = file / "config.yaml"
        raise ConfigError(f"--config {file} is a folder; a run's frozen configuration is the file {inside}.")
    if not file.is_file():
        raise ConfigError(f"--config {file}: there is no such file.")
    if newer := safe.explain_newer_format(file, safe.first_line(file)):
        raise ConfigError(f"{newer}.")
    try:
        text = safe.yaml_text(file)
        plugin_records.check(file, text)
        config = OmegaConf.load(io.StringIO(text))
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"--config {file} is not a mapping of settings.")
        return _with_later(Composed(to_plain(config, resolve=False), yaml_origins(text, str(file))), file)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {file} cannot be read as YAML: {reason}") from None


def _with_later(composed: Composed, file: Path) -> Composed:
    """Enter the settings that the frozen configuration ``file`` lacks because they came later."""
    values = later.enter(composed.values)
    before, origins = set(_keys(composed.values)), dict(composed.origins)
    for key in _keys(values):
        if key not in before:
            origins[key] = f"not in {file}, so as before the setting came"
    return replace(composed, values=values, origins=origins)


def _keys(values: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted key of every plain value."""
    for section, value in values.items():
        for key, _ in flat(value, section):
            yield key


def to_plain(config: Any, resolve: bool) -> dict[str, Any]:
    """Return an OmegaConf mapping as plain Python values; ``${...}`` stays as text unless ``resolve``."""
    try:
        values: Any = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=False)
        return dict(values)
    except OmegaConfBaseException as error:
        raise ConfigError(_describe_misfit(error)) from None


def _describe_misfit(error: Exception) -> str:
    """Return an error of Hydra on one line, with the reason that it keeps in its cause."""
    words = str(error).split()
    if error.__cause__:
        words += str(error.__cause__).split()
    return f"The YAML files do not fit together: {' '.join(words)}"
