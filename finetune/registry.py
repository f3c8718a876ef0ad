"""Names of methods, data sets, schedules and selectors, read from the source so that listing them imports nothing.

A class joins by ``@register("name")`` in a module of its kind's package; its literal class variables are its *facts*.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import ConfigError, near

Kind = Literal["method", "dataset", "schedule", "selector"]
PACKAGES: dict[Kind, str] = {
    "method": "methods",
    "dataset": "data",
    "schedule": "schedules",
    "selector": "selectors",
}
ROOT = Path(__file__).parent
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Entry:
    """One registered class as its source describes it."""

    name: str
    module: str
    doc: str
    facts: dict[str, Any] = field(default_factory=dict)


def register(name: str) -> Callable[[C], C]:
    """Give the decorated class its public ``name``."""

    def add(cls: C) -> C:
        cls.name = name  # type: ignore[attr-defined]  # the kinds' base classes declare it
        return cls

    return add


def _registered(node: ast.stmt) -> str | None:
    """The name in a class's ``@register("name")``, if it has one."""
    for call in node.decorator_list if isinstance(node, ast.ClassDef) else []:
        if (
            isinstance(call, ast.Call)
            and getattr(call.func, "id", None) == "register"
            and isinstance(call.args[0], ast.Constant)
        ):
            return str(call.args[0].value)
    return None


def _facts(node: ast.ClassDef) -> dict[str, Any]:
    """Literal ``ClassVar`` assignments of a class body."""
    found = {}
    for line in node.body:
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and "ClassVar" in ast.unparse(line.annotation)
            and line.value
        ):
            found[line.target.id] = ast.literal_eval(line.value)
    return found


@cache
def catalog(kind: Kind) -> dict[str, Entry]:
    """Every registered class of a kind by name, sorted. Raises ``ValueError`` when two share a name."""
    entries: dict[str, Entry] = {}
    for path in sorted((ROOT / PACKAGES[kind]).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and (name := _registered(node)):
                if name in entries:
                    raise ValueError(
                        f"{kind} {name!r} is registered in {entries[name].module} and in {path.stem}"
                    )
                module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
                entries[name] = Entry(
                    name,
                    module,
                    (ast.get_docstring(node) or "").split("\n")[0],
                    {"class": node.name, **_facts(node)},
                )
    return dict(sorted(entries.items()))


def get(kind: Kind, name: str) -> Any:
    """The class registered under ``name``; raises ``ConfigError`` naming the known ones."""
    entries = catalog(kind)
    if name not in entries:
        raise ConfigError(f"{kind}={name} is not known.{near(name, entries)} Known: {', '.join(entries)}.")
    return getattr(importlib.import_module(entries[name].module), entries[name].facts["class"])
