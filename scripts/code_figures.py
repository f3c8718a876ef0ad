"""Measure the code: sizes, density and circular imports.  python scripts/code_figures.py [--by-folder]
[--root DIR] [--json], or [--code FILE ...]

DIR is any checkout of this project, so two commits can be compared by the same measure. Nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTH = 110
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}  # kinds of tokens
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
# Base classes of methods, schedules and selectors, and of what they attach or keep.
KINDS = {"Method", "Schedule", "Selector", "Part", "Patched", "StateModule", "Bank"}
# Names of variables for such objects in code outside of core and methods.
HOLDERS = ("bank", "current", "delta", "method", "module", "part", "schedule", "selector", "state", "states")
# Attributes of other packages' objects that may be asked for by hasattr.
FOREIGN = {"use_cache": "configurations of transformers", "item": "scalars of numpy and torch"}
INTERNAL = ("hydra._internal", "accelerate.commands")


@dataclass
class Measured:
    """Counts over some files."""

    files: int = 0
    lines: int = 0
    long: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Count one occurrence of ``kind`` and record its place."""
        self.counts[kind] += 1
        self.places.setdefault(kind, []).append(place)

    def per_thousand(self, kind: str) -> float:
        """Return the occurrences of ``kind`` per thousand lines."""
        return 1000 * self.counts[kind] / max(1, self.lines)


def is_and_or_choice(node: ast.AST) -> bool:
    """Tell whether ``a and b or c`` stands for ``b if a else c``."""
    if not isinstance(node, ast.BoolOp) or not isinstance(node.op, ast.Or):
        return False
    return any(isinstance(value, ast.BoolOp) and isinstance(value.op, ast.And) for value in node.values[:-1])


def find_classes_of_kinds(root: Path) -> set[str]:
    """Return ``KINDS`` and the names of all classes of the package that derive from them."""
    bases: dict[str, set[str]] = {}
    for path in (root / "finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(ast.unparse(base) for base in node.bases)
    found, grown = set(KINDS), True
    while grown:
        more = {name for name, above in bases.items() if above & found} - found
        found |= more
        grown = bool(more)
    return found


def asks_for_class(node: ast.AST, classes: set[str]) -> bool:
    """Tell whether an expression tests the class of a part or method instead of using what it declares.

    Such expressions are ``isinstance`` with one of ``classes``, ``hasattr``, ``getattr`` with a default, and
    a comparison of the name of an object's class.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        asked, attribute = node.args[0], node.args[1]
        if node.func.id in ("isinstance", "issubclass"):
            named = {ast.unparse(name).rpartition(".")[2] for name in ast.walk(attribute)}
            return bool(named & classes)
        if node.func.id == "hasattr":
            return not (isinstance(attribute, ast.Constant) and attribute.value in FOREIGN)
        holder = ast.unparse(asked).rpartition(".")[2]
        return node.func.id == "getattr" and len(node.args) > 2 and holder in HOLDERS
    if isinstance(node, ast.Compare):
        sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
        return any(side.endswith((").__name__", ".__class__.__name__")) for side in sides)
    return False


def find_internal_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Return the internal names of Hydra and Accelerate that a module uses, each with its line number.

    These are imports from ``INTERNAL``, and private attributes in a module that imports one of the two.
    """
    found, uses_either = [], False
    attributes: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            uses_either |= source.partition(".")[0] in ("hydra", "accelerate")
            if source.startswith(INTERNAL):
                found += [(node.lineno, f"{source}.{name.name}") for name in node.names]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[:2] != "__":
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                attributes.append((node.lineno, f"{owner}.{node.attr}"))
    return found + attributes if uses_either else found


def measure_file(path: Path, label: str, total: Measured, classes: set[str]) -> None:
    """Add one file to ``total``. ``classes``: those that other folders must not ask for."""
    text = path.read_text(encoding="utf-8")
    rows = text.splitlines()
    total.files += 1
    total.lines += len(rows)
    for number, row in enumerate(rows, 1):
        if len(row) > WIDTH:
            total.long += 1
            total.places.setdefault("long lines", []).append(f"{label}:{number}")
    outside = not label.startswith(("finetune/core/", "finetune/methods/"))
    tree = ast.parse(text)
    for line, name in find_internal_names(tree):
        total.add("internal names", f"{label}:{line} {name}")
    for node in ast.walk(tree):
        place = f"{label}:{getattr(node, 'lineno', 0)}"
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if isinstance(node, COMPREHENSIONS) or called in ("map", "filter"):
            total.add("comprehensions", place)
        elif isinstance(node, ast.IfExp) or is_and_or_choice(node):
            total.add("ternaries", place)
        if outside and asks_for_class(node, classes):
            total.add("isinstance", place)


def find_modules(root: Path) -> dict[str, Path]:
    """Return the file of every module of the package, by dotted name."""
    found = {}
    for path in sorted((root / "finetune").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def find_imports(path: Path, root: Path, known: set[str]) -> set[str]:
    """Return the modules of this package that a file imports, also inside functions and for type checking."""
    folder = list(path.relative_to(root).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for name in node.names:
                full = f"{source}.{name.name}"
                found.add(full if full in known else source)
    return found & known


def make_import_graph(root: Path) -> dict[str, set[str]]:
    """Return, for every module, the modules that it imports."""
    known = find_modules(root)
    return {name: find_imports(path, root, set(known)) - {name} for name, path in known.items()}


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node, each sorted."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for target in graph.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        reach[start] = seen
    found = []
    for name in graph:
        circle = sorted(other for other in reach[name] if name in reach.get(other, ()))
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def get_folder(module: str) -> str:
    """Return the folder or top-level module directly below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def make_folder_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the same graph between the folders of the package."""
    found: dict[str, set[str]] = {}
    for module, targets in graph.items():
        here = get_folder(module)
        found.setdefault(here, set()).update(get_folder(target) for target in targets)
        found[here].discard(here)
    return found


def collect_figures(root: Path) -> tuple[Measured, dict[str, Measured], dict[str, Any]]:
    """Return the figures of a checkout: in total, by folder, and of its imports."""
    total, by_folder, classes = Measured(), dict[str, Measured](), find_classes_of_kinds(root)
    for name, path in find_modules(root).items():
        label = path.relative_to(root).as_posix()
        measure_file(path, label, total, classes)
        measure_file(path, label, by_folder.setdefault(get_folder(name), Measured()), classes)
    graph = make_import_graph(root)
    facts = {
        "circles of modules": find_circles(graph),
        "circles of folders": find_circles(make_folder_graph(graph)),
        "files at the top level": len(list((root / "finetune").glob("*.py"))),
    }
    return total, by_folder, facts


def count_code_lines(file: Path) -> int:
    """Count the lines of a file that hold code: no blank lines, comments or docstrings."""
    text = file.read_text(encoding="utf-8")
    lines = set()
    with file.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type not in NO_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            first = node.body[0]
            lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def print_code_lines(files: list[Path]) -> None:
    """Print the lines of code of each file, and their median."""
    counts = [count_code_lines(file) for file in files]
    for file, count in zip(files, counts, strict=True):
        print(f"{count:>6}  {file}")
    print(f"{statistics.median(counts):>6g}  median")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--by-folder", action="store_true", help="also print a line for each folder")
    parser.add_argument(
        "--where", choices=["long lines", "comprehensions", "ternaries", "isinstance", "internal names"]
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--code", nargs="+", type=Path, metavar="FILE", help="print the lines of code of these files instead"
    )
    given = parser.parse_args()
    if given.code:
        print_code_lines(given.code)
        return
    total, by_folder, facts = collect_figures(given.root)
    if given.where:
        print(*total.places.get(given.where, []), sep="\n")
        return
    figures = {
        "files": total.files,
        "lines": total.lines,
        f"lines over {WIDTH} characters": total.long,
        "comprehensions per thousand lines": round(total.per_thousand("comprehensions"), 1),
        "ternaries per thousand lines": round(total.per_thousand("ternaries"), 1),
        "isinstance outside core and methods": total.counts["isinstance"],
        "internal names of hydra and accelerate": total.counts["internal names"],
        "import circles of modules": len(facts["circles of modules"]),
        "import circles of folders": len(facts["circles of folders"]),
        "files at the package's top level": facts["files at the top level"],
    }
    if given.json:
        print(
            json.dumps(
                figures | {"circles": facts["circles of modules"] + facts["circles of folders"]}, indent=2
            )
        )
        return
    for name, value in figures.items():
        print(f"{value:>8}  {name}")
    if given.by_folder:
        print(f"\n{'folder':<12}{'files':>6}{'lines':>7}{'long':>6}{'comp.':>7}{'tern.':>7}")
        for name, part in sorted(by_folder.items()):
            density = f"{part.per_thousand('comprehensions'):>7.1f}{part.per_thousand('ternaries'):>7.1f}"
            print(f"{name:<12}{part.files:>6}{part.lines:>7}{part.long:>6}{density}")


if __name__ == "__main__":
    main()
