"""Where a setting came from: the line of a YAML file, the command line, or the default of a dataclass."""

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
    """``{"method.rank": "conf/method/lora.yaml:2"}`` for every key of a YAML text placed under the dotted ``package``."""
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    lines = dict(_keys(root, package))
    lines.pop("defaults" if not package else f"{package}.defaults", None)
    return {key: f"{label}:{line}" for key, line in lines.items()}


def _keys(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}".lstrip(".")
            yield name, key.start_mark.line + 1
            yield from _keys(value, name)


def origin_of(key: str, origins: dict[str, str]) -> str | None:
    """The origin of ``key``, or of the nearest mapping around it inside its section (``method.config`` for ``method.config.r``)."""
    if key in origins:
        return origins[key]
    parent = key.rpartition(".")[0]
    return origin_of(parent, origins) if "." in parent else None


@cache
def _field_lines(cls: type) -> dict[str, int]:
    """The line of each annotated name in the body of ``cls``."""
    tree = ast.parse(Path(inspect.getfile(cls)).read_text())
    body = next(
        (
            node.body
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__
        ),
        [],
    )
    return {
        line.target.id: line.lineno
        for line in body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def default_origin(cls: type, name: str) -> str:
    """``default in finetune/config/settings.py:42`` for a field of a dataclass, looked up in the class that declares it."""
    for owner in cls.__mro__:
        if name in inspect.get_annotations(owner):
            file = Path(inspect.getfile(owner))
            label = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE) else file
            return f"default in {label}:{_field_lines(owner).get(name, 1)}"
    return "default"


def _default_of(held: Any, names: list[str]) -> str:
    """The default that a value came from: the line of the field, or the line of the field around it that holds an instance with other values."""
    inner = getattr(held, names[0], None)
    if len(names) == 1 or not is_dataclass(inner):
        return default_origin(type(held), names[0])
    declared = {f.name: f.default for f in fields(inner)}
    as_declared = names[1] in declared and declared[names[1]] == getattr(inner, names[1])
    return _default_of(inner, names[1:]) if as_declared else default_origin(type(held), names[0])


def leaves(config: Config, origins: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """Every resolved value by dotted key, with where it came from."""
    found: dict[str, tuple[Any, str]] = {}
    for key, leaf in ((k, v) for section, value in config.as_dict().items() for k, v in flat(value, section)):
        section, *names = key.split(".")
        held = getattr(config, section)
        nested = len(names) > 1 and is_dataclass(
            getattr(held, names[0], None)
        )  # a default of its own beats the origin of the mapping around it
        origin = origins.get(key) if nested else origin_of(key, origins)
        found[key] = (
            leaf,
            origin or (_default_of(held, names) if names else default_origin(Config, section)),
        )
    return found


def flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; an empty mapping and a list are values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}")
    else:
        yield prefix, value
