"""List the kinds of things that can be added by name, and the classes registered for each.

``KINDS`` is the only table of kinds; all other code derives its list of kinds from this table.
A class joins by ``@register("name")`` in a module of a folder of its kind. Names, first lines of docstrings
and literal class variables (the *facts*) are read from the source, so that a listing imports nothing.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, suggest_nearest

ROOT = Path(__file__).parent
C = TypeVar("C", bound=type)
_ADDED: dict[str, dict[str, Entry]] = {}  # the classes of loaded plug-ins, by kind and name


@dataclass(frozen=True)
class Kind:
    """One kind of thing that can be added by name.

    ``base``: dotted name of the class that all classes of the kind derive from.
    ``folders``: where their modules lie, below the package, at any depth. Without folders the options of the
    kind are YAML files alone, which fill ``base``.
    ``place``: the dotted key in a configuration; a kind without a place is not part of a run's configuration.
    ``is_value``: the value at ``place`` is the name itself, and not a mapping with ``name`` and settings.
    ``absent``: the name that a configuration without the section means; its class has no settings.
    ``unnamed``: the name that a section without ``name`` means; ``name`` can then be set as a value, too.
    ``needs_torch``: importing a class of this kind imports torch, so it is avoided where possible.
    """

    name: str
    base: str = ""
    folders: tuple[str, ...] = ()
    place: str = ""
    is_value: bool = False
    absent: str | None = None
    unnamed: str | None = None
    needs_torch: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("method", "finetune.core.method.Method", ("methods",), "method", needs_torch=True),
        Kind("schedule", "finetune.core.sparse.schedule.Schedule", ("schedules",), "method.schedule"),
        Kind(
            "score",
            "finetune.core.sparse.scores.Score",
            ("scores", "methods"),
            "method.score",
            is_value=True,
        ),
        Kind("dataset", "finetune.data.dataset.Dataset", ("data",), "dataset"),
        Kind(
            "optimizer",
            "finetune.core.optimizer.Optimizer",
            ("optim",),
            "optimizer",
            unnamed="adamw",
            needs_torch=True,
        ),
        Kind(
            "objective",
            "finetune.core.objective.Objective",
            ("objectives",),
            "objective",
            absent="task",
            needs_torch=True,
        ),
        Kind("selector", "finetune.core.selector.Selector", ("selectors",), "selector", absent="none"),
        Kind("analysis", "finetune.core.analysis.Analysis", ("analyses",), needs_torch=True),
        Kind("model", "finetune.config.settings.ModelConfig", place="model"),
        Kind("pass", "finetune.core.passes.Pass", ("passes",), needs_torch=True),
        Kind("structure", "finetune.core.structure.Structure", ("structures",), needs_torch=True),
        Kind("sweep"),
        Kind("launcher"),
    )
}


@dataclass(frozen=True)
class Named:
    """Mark a text setting that is the name of a registered class: ``Annotated[str, Named("score")]``."""

    kind: str


@dataclass(frozen=True)
class Entry:
    """One registered class as its source describes it."""

    name: str
    module: str
    doc: str
    facts: dict[str, Any] = field(default_factory=dict)


def top_level() -> list[Kind]:
    """Return the kinds that have a section of their own."""
    return [kind for kind in KINDS.values() if kind.place == kind.name]


def sections() -> list[Kind]:
    """Return the kinds whose class is chosen by the ``name`` in a section of their own."""
    return [kind for kind in top_level() if kind.folders]


def nested() -> dict[str, Kind]:
    """Return, by place, the kinds whose class is chosen by ``name`` in a mapping inside another section."""
    return {kind.place: kind for kind in KINDS.values() if "." in kind.place and not kind.is_value}


def choices() -> dict[str, str]:
    """Return, by group of YAML files, the setting that names the chosen option."""
    found = {}
    for kind in KINDS.values():
        if kind.place and not kind.is_value:
            found[kind.name] = f"{kind.place}.name"
    return found


def outside_runs() -> list[str]:
    """Return the groups of YAML files that are not part of a run's configuration."""
    return [kind.name for kind in KINDS.values() if not kind.place]


def register(name: str) -> Callable[[C], C]:
    """Give the decorated class its public ``name``."""

    def add(cls: C) -> C:
        cls.name = name  # type: ignore[attr-defined]  # the kinds' base classes declare it
        return cls

    return add


def _registered_name(node: ast.ClassDef) -> str | None:
    """Return the name in a class's ``@register("name")``, if it has one."""
    for call in node.decorator_list:
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "register" or not call.args:
            continue
        if isinstance(call.args[0], ast.Constant):
            return str(call.args[0].value)
    return None


def _facts(node: ast.ClassDef) -> dict[str, Any]:
    """Return the ``ClassVar`` assignments of a class body whose values are literals."""
    found = {"class": node.name}
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or not line.value:
            continue
        if "ClassVar" in ast.unparse(line.annotation):
            with suppress(ValueError):
                found[line.target.id] = ast.literal_eval(line.value)
    return found


def _kind_of(node: ast.ClassDef, folder: str) -> str:
    """Return the kind whose base class ``node`` names as a base, else the kind that lives in ``folder``."""
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    for kind in KINDS.values():
        if kind.folders and kind.base.rpartition(".")[2] in bases:
            return kind.name
    return next(kind.name for kind in KINDS.values() if folder in kind.folders)


def registered_classes(text: str, module: str) -> list[tuple[ast.ClassDef, Entry]]:
    """Return each registered class in the source ``text`` of a module."""
    found: list[tuple[ast.ClassDef, Entry]] = []
    if "@register(" not in text:
        return found
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and (name := _registered_name(node)):
            doc = (ast.get_docstring(node) or "").split("\n")[0]
            found.append((node, Entry(name, module, doc, _facts(node))))
    return found


@cache
def _read_folder(folder: str) -> list[tuple[str, Entry]]:
    """Return each registered class in a folder of the package, with its kind."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        for node, entry in registered_classes(path.read_text(encoding="utf-8"), module):
            found.append((_kind_of(node, folder), entry))
    return found


def catalog(kind: str) -> dict[str, Entry]:
    """Return every registered class of a kind by name, sorted; those of plug-ins are among them once loaded.

    Raises ``ValueError`` when two classes of the package share a name.
    """
    return dict(sorted((_own_catalog(kind) | _ADDED.get(kind, {})).items()))


@cache
def _own_catalog(kind: str) -> dict[str, Entry]:
    """Return the registered classes of a kind that this package brings."""
    entries: dict[str, Entry] = {}
    for folder in KINDS[kind].folders:
        for its_kind, entry in _read_folder(folder):
            if its_kind != kind:
                continue
            if entry.name in entries:
                first = entries[entry.name].module
                raise ValueError(f"{kind} {entry.name!r} is registered in {first} and in {entry.module}")
            entries[entry.name] = entry
    return entries


def add(kind: str, entry: Entry) -> None:
    """Add a class that a plug-in brings, whose module has been imported."""
    _ADDED.setdefault(kind, {})[entry.name] = entry


def remove(kind: str, name: str) -> None:
    """Take a class of a plug-in out again."""
    del _ADDED[kind][name]


def get(kind: str, name: str) -> Any:
    """Import the class registered under ``name``; raises ``ConfigError`` naming the known ones."""
    entries = catalog(kind)
    if name not in entries:
        raise ConfigError(
            f"{kind}={name} is not known.{suggest_nearest(name, entries)} Known: {', '.join(entries)}."
        )
    entry = entries[name]
    return getattr(importlib.import_module(entry.module), entry.facts["class"])


def base_class(kind: Kind) -> Any:
    """Import the class that all classes of the kind derive from."""
    module, _, name = kind.base.rpartition(".")
    return getattr(importlib.import_module(module), name)


def import_all() -> None:
    """Import every registered class of every kind."""
    for kind in KINDS:
        for name in catalog(kind):
            get(kind, name)


def clear() -> None:
    """Forget what was read from the source."""
    _read_folder.cache_clear()
    _own_catalog.cache_clear()
