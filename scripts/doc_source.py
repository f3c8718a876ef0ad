"""Read classes, options and docstrings of the package from its source, without importing it.

The pages of the documentation are made from what this module finds, so building them needs neither torch
nor transformers. ``doc_pages.py`` writes the pages.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from finetune.registry import KINDS, catalog  # noqa: E402  # the repository is on the path from here on

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("Formula", "Paper", "Reading", "Rate", "Differs", "Cost")
OPTIONS = "Options"
BOUNDS = {
    "Ge": "at least {}",
    "Gt": "above {}",
    "Le": "at most {}",
    "Lt": "below {}",
    "MultipleOf": "a multiple of {}",
}
PLAIN_TYPES = {"int": "whole number", "float": "number", "str": "text", "bool": "`true` or `false`"}


@dataclass(frozen=True)
class Definition:
    """A class or a function, and the dotted name of the module that holds it."""

    module: str
    node: ast.ClassDef | ast.FunctionDef

    @property
    def doc(self) -> str:
        """Return the docstring, or an empty text."""
        return ast.get_docstring(self.node) or ""


@dataclass(frozen=True)
class Option:
    """One field of a frozen dataclass, as a user sets it."""

    name: str
    default: str
    values: str
    meaning: str


@dataclass
class Sections:
    """A docstring in parts: the first line, the text below it, and the labelled paragraphs by label."""

    title: str = ""
    text: str = ""
    labelled: dict[str, str] = field(default_factory=dict)


@cache
def parse_module(module: str) -> ast.Module:
    """Parse a module of the package. Raise ``LookupError`` if there is none of this name."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    raise LookupError(f"there is no module {module}")


def module_file(module: str) -> Path:
    """Return the file of a module that is not a package."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def find_definition(module: str, name: str) -> tuple[str, ast.AST] | None:
    """Find what ``name`` means in ``module``: a class, a function or an assigned value, through imports."""
    for node in parse_module(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return module, node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = absolute_module(module, node)
                    return find_definition(source, alias.name) if source.startswith("finetune") else None
    return None


def absolute_module(module: str, node: ast.ImportFrom) -> str:
    """Return the module that an import statement in ``module`` names."""
    if not node.level:
        return node.module or ""
    base = module.split(".")
    if not (ROOT.joinpath(*base) / "__init__.py").is_file():
        base = base[:-1]
    base = base[: len(base) - node.level + 1]
    return ".".join([*base, *(node.module or "").split(".")]).rstrip(".")


def class_chain(found: Definition) -> list[Definition]:
    """Return a class and its base classes inside the package, the class itself first."""
    chain = [found]
    assert isinstance(found.node, ast.ClassDef)
    for base in found.node.bases:
        target = find_definition(found.module, ast.unparse(base))
        if target and isinstance(target[1], ast.ClassDef):
            chain += class_chain(Definition(*target))
    return chain


def split_docstring(doc: str, labels: tuple[str, ...]) -> Sections:
    """Divide a docstring by the ``labels`` that stand at its left margin, each followed by a colon."""
    title, _, rest = doc.partition("\n")
    parts = re.split(rf"^({'|'.join(labels)}):", rest, flags=re.MULTILINE)
    sections = Sections(title.strip(), parts[0].strip("\n"))
    for label, text in zip(parts[1::2], parts[2::2], strict=True):
        first, newline, following = text.partition("\n")
        sections.labelled[label] = (first.strip() + newline + following).strip("\n")
    return sections


def option_meanings(doc: str) -> dict[str, str]:
    """Return what the ``Options:`` part of a class docstring says of each option."""
    text = inspect.cleandoc("\n" + split_docstring(doc, (OPTIONS,)).labelled.get(OPTIONS, ""))
    meanings: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        start = re.match(r"(\w+): (.*)", line)
        if start:
            name = start[1]
            meanings[name] = start[2]
        elif name and line.startswith(" "):
            meanings[name] += " " + line.strip()
    return meanings


def read_options(found: Definition) -> list[Option]:
    """Return the options of a frozen dataclass, inherited ones first, each with its last default."""
    declared: dict[str, tuple[str, ast.AnnAssign]] = {}
    meanings: dict[str, str] = {}
    for definition in reversed(class_chain(found)):
        meanings |= option_meanings(definition.doc)
        for line in definition.node.body:
            if not isinstance(line, ast.AnnAssign) or "ClassVar" in ast.unparse(line.annotation):
                continue
            assert isinstance(line.target, ast.Name)
            declared[line.target.id] = (definition.module, line)
    options = []
    for name, (module, line) in declared.items():
        default = show_default(module, line.value)
        options.append(Option(name, default, show_values(module, line.annotation), meanings.get(name, "")))
    return options


def show_default(module: str, value: ast.expr | None) -> str:
    """Write a default as a user would type it, or an empty text if the option has none."""
    if value is None:
        return ""
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func)
        if name == "field":
            for keyword in value.keywords:
                if keyword.arg == "default":
                    return show_default(module, keyword.value)
                if keyword.arg == "default_factory":
                    return {"dict": "{}", "list": "[]"}.get(ast.unparse(keyword.value), "")
            return ""
        target = find_definition(module, name)
        if target and isinstance(target[1], ast.ClassDef):
            public = registered_name(target[1]) or name
            settings = [f"{word.arg}={ast.unparse(word.value)}" for word in value.keywords]
            return " ".join([public, *settings])
    if isinstance(value, ast.Attribute | ast.Name):
        target = find_definition(module, ast.unparse(value))
        if target and isinstance(target[1], ast.expr):
            return show_default(*target)
        return ast.unparse(value)
    return show_value(ast.literal_eval(value))


def show_value(value: object) -> str:
    """Write a Python value in the grammar of the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(show_value(each) for each in value) + "]"
    return str(value)


def registered_name(node: ast.ClassDef) -> str:
    """Return the name that ``@register`` gives to a class, or an empty text."""
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "register":
            names = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            return str(names[-1])
    return ""


def show_values(module: str, annotation: ast.expr) -> str:
    """Say in words which values an annotation allows."""
    if isinstance(annotation, ast.BinOp):
        sides = [show_values(module, side) for side in (annotation.left, annotation.right)]
        return " or ".join(sides)
    if isinstance(annotation, ast.Constant):
        return "`null`" if annotation.value is None else str(annotation.value)
    if isinstance(annotation, ast.Subscript):
        return show_subscript(module, ast.unparse(annotation.value), annotation.slice)
    name = ast.unparse(annotation)
    if name in PLAIN_TYPES:
        return PLAIN_TYPES[name]
    target = find_definition(module, name)
    if target is None:
        return f"`{name}`"
    if isinstance(target[1], ast.ClassDef):
        return show_names_of(f"{target[0]}.{target[1].name}")
    assert isinstance(target[1], ast.expr)
    return show_values(target[0], target[1])


def show_subscript(module: str, generic: str, inner: ast.expr) -> str:
    """Say in words which values ``generic[inner]`` allows."""
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if generic == "Literal":
        return ", ".join(f"`{show_value(ast.literal_eval(part))}`" for part in parts)
    if generic == "Annotated":
        return show_annotated(show_values(module, parts[0]), parts[1:])
    if generic == "tuple":
        if isinstance(parts[-1], ast.Constant) and parts[-1].value is ...:
            return f"list of {show_values(module, parts[0])}"
        return f"list of {len(parts)}: {show_values(module, parts[0])}"
    if generic == "dict":
        return "mapping"
    return f"`{generic}`"


def show_annotated(values: str, marks: list[ast.expr]) -> str:
    """Say in words which ``values`` remain within the marks of an ``Annotated`` type."""
    said = [values]
    for mark in marks:
        if not isinstance(mark, ast.Call):
            continue
        name = ast.unparse(mark.func).rpartition(".")[2]
        if name == "Named":  # the value is the name of a registered class
            return show_names(catalog(ast.literal_eval(mark.args[0])))
        if name in BOUNDS:
            said.append(BOUNDS[name].format(show_bound(mark.args[0])))
    return ", ".join(said)


def show_names_of(base: str) -> str:
    """List what can be chosen of the kind whose base class is ``base``, a dotted name."""
    for kind in KINDS.values():
        if kind.base == base:
            names: list[str] = []
            for entry in catalog(kind.name):
                names += group_options(kind.name, entry)
            return show_names(sorted(names))
    return f"`{base}`"


def group_options(kind: str, name: str) -> list[str]:
    """Return the YAML files that choose the registered ``name``, or the name if there are none."""
    found = []
    for file in sorted((ROOT / "conf" / kind).glob("*.yaml")):
        if re.search(rf"^ *name: {name}$", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(file.stem)
    return found or [name]


def show_names(names: Iterable[str]) -> str:
    """List names as code."""
    return ", ".join(f"`{name}`" for name in names)


def show_bound(bound: ast.expr) -> str:
    """Write the limit of an option; an expression that is not a literal stays as it is in the source."""
    try:
        return show_value(ast.literal_eval(bound))
    except ValueError:
        return f"`{ast.unparse(bound)}`"


def public_definitions(module: str) -> list[Definition]:
    """Return the classes and functions of a module whose names do not start with an underscore."""
    found = []
    for node in parse_module(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            found.append(Definition(module, node))
    return found
