"""Find the YAML groups, built-in ones and others, and refuse files that may not be used."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from ..errors import ConfigError
from ..system import safe
from . import plugins
from .origins import PACKAGE

# The call of a resolver. Hydra would make such a call while it reads a list of defaults.
CALL = re.compile(r"\$\{[^{}]*:[^{}]*\}")


def conf_dir() -> Path:
    """Return the folder of the built-in groups: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def roots(config_dir: Path | None) -> list[Path]:
    """Return the folders of groups in the order of search: the user's, the built-in one, plug-ins'."""
    found = [conf_dir(), *plugins.conf_dirs()]
    return [config_dir, *found] if config_dir else found


def yaml_files(config_dir: Path | None) -> list[Path]:
    """Return the YAML files of all folders of groups."""
    found: list[Path] = []
    for root in roots(config_dir):
        found += _files_in(root)
    return found


def _files_in(root: Path) -> list[Path]:
    return [*root.glob("*.yaml"), *root.glob("*/*.yaml")]


def stamps(config_dir: Path | None) -> tuple[tuple[str, int], ...]:
    """Return a value that changes whenever a file of the groups changes."""
    found = []
    for file in yaml_files(config_dir):
        if file.exists():
            found.append((str(file), file.stat().st_mtime_ns))
    return tuple(found)


def label(file: Path, config_dir: Path | None) -> str:
    """Return the name of a file of the groups for messages."""
    if file.is_relative_to(conf_dir()):
        return f"conf/{file.relative_to(conf_dir())}"
    if config_dir and file.is_relative_to(config_dir.resolve()):
        return str(config_dir / file.relative_to(config_dir.resolve()))
    return str(file)


def check(config_dir: Path | None) -> None:
    """Raise ``ConfigError`` for files that are too large or deep, call a resolver, or have a taken name.

    The built-in files are not checked.
    """
    faults = _name_clashes()
    for file in yaml_files(config_dir):
        if file.is_relative_to(conf_dir()):
            continue
        try:
            call = CALL.search(safe.yaml_text(file))
        except safe.Unsafe as error:
            faults.append(f"{file} is not read: {error}. Make it smaller, or remove it.")
            continue
        except (OSError, ValueError, yaml.YAMLError):
            continue  # composing the file says what is wrong, if the file is chosen
        if call:
            faults.append(
                f"{file}: {call[0]} is not resolved: a value can refer to another setting by ${{key}}, and "
                "to nothing else."
            )
    if faults:
        raise ConfigError(*faults)


def _name_clashes() -> list[str]:
    """Return a fault for each YAML file of a plug-in whose name a built-in or another plug-in's file has."""
    faults, known = [], [conf_dir()]
    for root in plugins.conf_dirs():
        for file in _files_in(root):
            name = file.relative_to(root)
            for other in known:
                if (other / name).exists():
                    faults.append(
                        f"{file}: {name} exists already in {other}. Rename it: only --config-dir replaces "
                        "built-in files."
                    )
        known.append(root)
    return faults
