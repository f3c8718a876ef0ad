"""Record the plug-ins that a run uses, and compare those of a run with what is loaded.

A run records names, versions and SHA-256 only, so a folder never says what to import.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypedDict

from .. import registry
from ..errors import ConfigError
from ..system import safe
from ..system.exit_code import print_line
from ..system.hints import read_hints
from . import plugins

COMMENT = "# plug-in "  # starts a line of a run's config.yaml
HEADER_LINES = 64  # of a config.yaml that are searched for such lines
SHOWN_DIGITS = 10


class PluginRecord(TypedDict):
    """What a run records of a plug-in. ``version`` is "" if the plug-in states none."""

    name: str
    version: str
    sha256: str


_warned: set[str] = set()


def _record(plugin: plugins.Plugin) -> PluginRecord:
    return {"name": plugin.name, "version": plugin.version, "sha256": plugin.sha256}


def used_by(config: Any) -> list[PluginRecord]:
    """Return the record of each plug-in that a configuration takes a class from."""
    modules = set(_modules_of(config))
    found = []
    for plugin in plugins.loaded():
        if any(plugin.provides(module) for module in modules):
            found.append(_record(plugin))
    return found


def _modules_of(value: Any) -> Iterable[str]:
    """Yield the modules of the classes that a configuration uses, by instance or name, and of their bases."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _modules_of(inner)
    if not is_dataclass(value):
        return
    cls: type = type(value)
    for base in cls.__mro__:
        yield base.__module__
    hints = read_hints(cls)
    for item in fields(value):
        inner = getattr(value, item.name)
        yield from _modules_of(inner)
        for mark in getattr(hints[item.name], "__metadata__", ()):
            if isinstance(mark, registry.Named) and inner in registry.catalog(mark.kind):
                yield registry.catalog(mark.kind)[inner].module


def record_of(config: Any) -> dict[str, list[PluginRecord]]:
    """Return the key ``plugins`` of result.json and delta.json, or an empty mapping if no plug-in is used."""
    found = used_by(config)
    return {"plugins": found} if found else {}


def comments(config: Any) -> list[str]:
    """Return the lines of a run's config.yaml that name the plug-ins it uses."""
    return [COMMENT + json.dumps(record) for record in used_by(config)]


def check(file: Path, text: str) -> None:
    """Compare the plug-ins that a frozen configuration names with those that are loaded.

    ``text``: the content of ``file``.

    Raises ``ConfigError`` for each that is not loaded, and warns of each whose files differ.
    """
    ours = [_record(plugin) for plugin in plugins.loaded()]
    faults = []
    for theirs in _recorded(text):
        if theirs in ours or any(theirs["sha256"] == record["sha256"] for record in ours):
            continue
        same_name = [record for record in ours if record["name"] == theirs["name"]]
        if same_name:
            _warn(
                f"Warning: the plug-in {describe(theirs)} that {file} was made with is loaded as "
                f"{describe(same_name[0])}: its code has changed. "
                "To train with the new code alone, choose another run= or name=."
            )
            continue
        faults.append(
            f"{file} was made with the plug-in {describe(theirs)}, which is not loaded. "
            "Name its folder by --plugins DIR, or install the package that brings it."
        )
    if faults:
        raise ConfigError(*faults)


def check_file(file: Path) -> None:
    """Do what ``check`` does for a file that may be missing or damaged, of which it then says nothing."""
    check(file, _read_text(file))


def read_records(file: Path) -> list[PluginRecord]:
    """Return the records of the plug-ins in the frozen configuration ``file``; none if it cannot be read."""
    return _recorded(_read_text(file))


def _read_text(file: Path) -> str:
    try:
        return safe.read(file, safe.YAML_BYTES).decode()
    except (OSError, ValueError):
        return ""


def describe(record: PluginRecord) -> str:
    """Return name, version and the start of the digest of a plug-in, for a message."""
    version = f" {record['version']}" if record["version"] else ""
    return f"{record['name']}{version} (SHA-256 {record['sha256'][:SHOWN_DIGITS]})"


def describe_others(records: Sequence[PluginRecord], known: Sequence[PluginRecord]) -> str:
    """Describe the plug-ins in ``records`` whose code ``known`` lacks; "" if there is none."""
    digests = {record["sha256"] for record in known}
    return ", ".join(describe(record) for record in records if record["sha256"] not in digests)


def _recorded(text: str) -> list[PluginRecord]:
    """Return the records in the comments at the top of a frozen configuration; other lines are left out."""
    found = []
    for line in text.splitlines()[:HEADER_LINES]:
        if not line.startswith(COMMENT):
            continue
        try:
            record = safe.parse_json(line.removeprefix(COMMENT))
        except ValueError:
            continue
        if not safe.find_mismatch(record, read_hints(PluginRecord)):
            found.append(record)
    return found


def _warn(line: str) -> None:
    """Print a warning once."""
    if line not in _warned:
        _warned.add(line)
        print_line(line)
