"""The YAML groups, ours and the user's: where their files lie, and what those of the user may not hold."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from ..errors import ConfigError
from ..system import safe
from . import plugins
from .origins import PACKAGE

CALL = re.compile(
    r"\$\{[^{}]*:[^{}]*\}"
)  # of a resolver, which Hydra would call while it reads a list of defaults


def conf_dir() -> Path:
    """The YAML groups: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def roots(config_dir: Path | None) -> list[Path]:
    """Return the folders of groups in the order in which they are searched: the user's, ours, those of plug-ins."""
    found = [conf_dir(), *plugins.conf_dirs()]
    return [config_dir, *found] if config_dir else found


def yaml_files(config_dir: Path | None) -> list[Path]:
    """Return the YAML files of all folders of groups."""
    found: list[Path] = []
    for root in roots(config_dir):
        found += [*root.glob("*.yaml"), *root.glob("*/*.yaml")]
    return found


def stamps(config_dir: Path | None) -> tuple[tuple[str, int], ...]:
    """Changes whenever a file of the groups does."""
    return tuple((str(file), file.stat().st_mtime_ns) for file in yaml_files(config_dir) if file.exists())


def label(file: Path, config_dir: Path | None) -> str:
    """A file of the groups as people know it."""
    if file.is_relative_to(conf_dir()):
        return f"conf/{file.relative_to(conf_dir())}"
    if config_dir and file.is_relative_to(config_dir.resolve()):
        return str(config_dir / file.relative_to(config_dir.resolve()))
    return str(file)


def check(config_dir: Path | None) -> None:
    """Raise ``ConfigError`` naming every file of the user's that is too large, too deep, or calls something."""
    faults = _doubled()
    for file in [file for file in yaml_files(config_dir) if not file.is_relative_to(conf_dir())]:
        try:
            called = CALL.search(safe.yaml_text(file))
        except safe.Unsafe as error:
            faults.append(f"{file} is not read: {error}. Make it smaller, or take it away.")
            continue
        except (OSError, ValueError, yaml.YAMLError):
            continue  # a fault of its own, which counts where the file is chosen
        if called:
            faults.append(
                f"{file}: {called[0]} is not resolved: a value can refer to another setting by ${{key}}, and to nothing else."
            )
    if faults:
        raise ConfigError(*faults)


def _doubled() -> list[str]:
    """Return a fault for each YAML file of a plug-in that has the name of one of ours or of another plug-in's."""
    faults, seen = list[str](), {conf_dir()}
    for root in plugins.conf_dirs():
        for file in (*root.glob("*.yaml"), *root.glob("*/*.yaml")):
            for other in seen:
                if (other / file.relative_to(root)).exists():
                    faults.append(
                        f"{file}: {file.relative_to(root)} is there already, in {other}. Rename it: only --config-dir "
                        "replaces built-in files."
                    )
        seen.add(root)
    return faults
