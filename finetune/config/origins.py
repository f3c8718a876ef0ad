"""Find where a setting came from: a line of a YAML file, the command line, or a default of a dataclass."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .settings import Config

PACKAGE = Path(__file__).parents[1]


def yaml_origins(text: str, label: str, package: str = "") -> dict[str, str]:
    """Return ``{"method.rank": "conf/method/lora.yaml:2"}`` for every key of a YAML text.

    ``label``: the name of the file; ``package``: the dotted key that the text is placed under.
    """
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    lines = dict(_key_lines(root, package))
    lines.pop(f"{package}.defaults".lstrip("."), None)
    return {key: f"{label}:{line}" for key, line in lines.items()}


def _key_lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield every dotted key inside a YAML mapping with its line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}".lstrip(".")
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, name)


def origin_of(key: str, origins: dict[str, str]) -> str | None:
    """Return the origin of ``key``, or of the nearest mapping around it inside its section.

    For ``method.config.r`` that is ``method.config``.
    """
    if key in origins:
        return origins[key]
    parent = key.rpartition(".")[0]
    return origin_of(parent, origins) if "." in parent else None


def default_origin(cls: type, name: str) -> str:
    """Return ``default in finetune/config/settings.py:42`` for a field, in the class that declares it."""
    for owner in cls.__mro__:
        if name in inspect.get_annotations(owner):
            file = Path(inspect.getfile(owner))
            label = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE) else file
            return f"default in {label}:{_field_lines(owner).get(name, 1)}"
    return "default"


@cache
def _field_lines(cls: type) -> dict[str, int]:
    """Return the line of each annotated name in the body of ``cls``."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef) or node.name != cls.__name__:
            continue
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found.setdefault(line.target.id, line.lineno)
    return found


def _default_of(owner: Any, names: list[str]) -> str:
    """Return the line of the default that a value came from.

    A field may hold an instance whose values differ from the defaults of their own class; those come from
    that field.
    """
    inner = getattr(owner, names[0], None)
    if len(names) == 1 or not is_dataclass(inner):
        return default_origin(type(owner), names[0])
    for item in fields(inner):
        if item.name == names[1] and item.default == getattr(inner, names[1]):
            return _default_of(inner, names[1:])
    return default_origin(type(owner), names[0])


def leaves(config: Config, origins: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """Return every resolved value by dotted key, with where it came from."""
    found: dict[str, tuple[Any, str]] = {}
    for section, part in config.as_dict().items():
        for key, value in flat(part, section):
            found[key] = value, _origin_in(config, key, origins)
    return found


def _origin_in(config: Config, key: str, origins: dict[str, str]) -> str:
    """Return where the value at a dotted key of a configuration came from."""
    section, *names = key.split(".")
    if not names:
        return origins.get(key) or default_origin(Config, section)
    owner = config.section(section)
    if isinstance(owner, dict):  # ``streams`` has an instance for each name
        owner, *names = owner[names[0]], *names[1:]
    is_nested = len(names) > 1 and is_dataclass(getattr(owner, names[0], None))
    # In a nested instance, the default of its own class is nearer than the mapping around it.
    origin = origins.get(key) if is_nested else origin_of(key, origins)
    return origin or _default_of(owner, names)


def flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested mappings; an empty mapping and a list are values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}")
    else:
        yield prefix, value
