"""Imports run one way, so that the parts can be understood, and used, alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "finetune"
BOTTOM = {"errors", "registry", "safe", "settings"}
SIDE = {"core"} | BOTTOM
ALLOWED = {
    "errors": set(),
    "safe": {"errors"},
    "registry": {"errors"},
    "settings": {"errors"},
    "core": {"errors"},
    "methods": SIDE | {"schedules"},
    "schedules": SIDE,
    "selectors": SIDE,
    "models": SIDE,
    "data": SIDE,
    "optim": {"core", "errors"},
    "config": BOTTOM | {"strict", "explain", "grammar", "groups", "references"},
    "grammar": {"errors"},
    "groups": BOTTOM | {"explain"},
    "references": {"explain"},
    "strict": BOTTOM | {"explain", "core"},
    "explain": BOTTOM,
    "report": {"errors", "safe", "settings"},
    "train": SIDE | {"config", "data", "models", "optim", "progress"},
    "testing": SIDE | {"data", "train"},
}


def _imports(file: Path) -> set[str]:
    """Top-level parts of this package that a file imports, at any depth of its code."""
    here = file.relative_to(ROOT.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = [*here[: -node.level], *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
            names = [a.name for a in node.names] if parts in (["finetune"], ["finetune", ""]) else [parts[1]] if parts[0] == "finetune" else []
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("finetune.")}
    return found - {"__version__"}


def test_imports_run_one_way() -> None:
    wrong, seen = [], set()
    for file in ROOT.rglob("*.py"):
        part = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if part in ALLOWED:
            seen.add(part)
            wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in _imports(file) - ALLOWED[part] - {part}]
    assert not wrong
    assert seen == set(ALLOWED)


@pytest.mark.parametrize("package", ["methods", "schedules", "selectors"])
def test_siblings_do_not_import_each_other(package: str) -> None:
    for file in (ROOT / package).glob("*.py"):
        text = file.read_text()
        assert "from ." not in text.replace("from ..", ""), file
        assert f"finetune.{package}" not in text, file
        assert f"from ..{package}" not in text, file


def test_only_config_and_launchers_know_hydra() -> None:
    users = {f.name for f in ROOT.rglob("*.py") if "import hydra" in f.read_text() or "from hydra" in f.read_text() or "omegaconf" in f.read_text()}
    assert users == {"config.py", "grammar.py", "jobs.py"}  # the configuration, and the launchers of clusters
