"""Imports run one way, in every folder of the package, so that each part can be understood and used alone."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

from finetune import registry

ROOT = Path(__file__).parents[1]
RULER = runpy.run_path(str(ROOT / "scripts" / "code_figures.py"))
GRAPH: dict[str, set[str]] = RULER["make_import_graph"](ROOT)

BOTTOM = {"__init__", "errors"}
KIND = BOTTOM | {"registry", "core"}  # what the folder of a kind may use that has no row of its own
FOLDERS_OF_KINDS = {folder for kind in registry.KINDS.values() for folder in kind.folders}
RUNS = KIND | {"system", "config", "data", "models", "objectives", "optim", "storage", "training"}
ALLOWED = {
    "__init__": {"errors", "system", "api"},
    "__main__": {"cli"},
    "errors": set(),
    "registry": BOTTOM | {"system"},
    "system": BOTTOM,
    "api": RUNS | {"launch", "report", "artifacts"},
    "core": BOTTOM | {"registry"},
    "config": BOTTOM | {"registry", "system"},
    "methods": KIND | {"schedules"},
    "data": KIND | {"system"},
    "models": KIND | {"system", "config", "storage"},  # a folder may name structures
    "report": BOTTOM | {"registry", "system", "config", "core"},  # what a plot shows
    "storage": BOTTOM | {"system", "config", "core"},  # what a state declares of how it is stored
    "training": RUNS,
    "testing": RUNS | {"artifacts"},
    "launch": RUNS | {"report"},
    "artifacts": RUNS | {"launch"},
    "analyses": RUNS | {"report", "artifacts"},
    "sweep": RUNS | {"launch", "report"},
    "cli": RUNS | {"launch", "report", "artifacts", "sweep"},
}  # a name that is not a key may not be imported from: only __main__ may know the command line
WITHOUT_A_ROW = sorted(FOLDERS_OF_KINDS - ALLOWED.keys())
ALLOWED |= dict.fromkeys(WITHOUT_A_ROW, KIND)


def test_imports_run_one_way() -> None:
    folders = RULER["make_folder_graph"](GRAPH)
    assert folders.keys() == ALLOWED.keys()
    wrong = {
        name: sorted(targets - ALLOWED[name]) for name, targets in folders.items() if targets - ALLOWED[name]
    }
    assert not wrong


def test_there_is_no_circle() -> None:
    assert RULER["find_circles"](GRAPH) == []
    assert RULER["find_circles"](RULER["make_folder_graph"](GRAPH)) == []


def test_siblings_do_not_import_each_other() -> None:
    """A method never imports a method; nor a schedule a schedule, nor a selector a selector."""
    bases = {kind.base.rpartition(".")[0] for kind in registry.KINDS.values()}
    assert {"schedules", "scores", "selectors"} <= set(WITHOUT_A_ROW)
    for module, targets in GRAPH.items():
        for folder in ("methods", *WITHOUT_A_ROW):
            if module.startswith(f"finetune.{folder}."):
                siblings = {target for target in targets if target.startswith(f"finetune.{folder}.")}
                assert not siblings - bases, module


def test_only_config_and_launchers_know_hydra() -> None:
    users = set()
    for module, path in RULER["find_modules"](ROOT).items():
        text = path.read_text(encoding="utf-8")
        if "import hydra" in text or "from hydra" in text or "omegaconf" in text:
            users.add(module)
    assert users == {
        "finetune.config.compose",
        "finetune.config.grammar",
        "finetune.config.load",
        "finetune.sweep.jobs",
    }


def test_the_ruler_finds_internal_names_of_hydra() -> None:
    lines = ["from hydra._internal.defaults_list import create", "loader._compose(self._place)"]
    found = RULER["find_internal_names"](ast.parse("\n".join(lines)))
    assert found == [(1, "hydra._internal.defaults_list.create"), (2, "loader._compose")]
    assert RULER["find_internal_names"](ast.parse("found._asdict()")) == []


def test_only_core_and_methods_ask_for_the_class_of_a_part_or_method() -> None:
    """Other folders use what parts, states and methods declare."""
    total, _, _ = RULER["collect_figures"](ROOT)
    assert total.places.get("isinstance", []) == []


def test_the_ruler_finds_each_way_to_ask_for_a_class() -> None:
    asking = [
        "isinstance(x, InPlace)",
        "isinstance(x, inplace.InPlace)",
        "hasattr(state, 'tuner')",
        "getattr(method, 'grain', None)",
        "type(delta).__name__ == 'LowRank'",
    ]
    harmless = [
        "isinstance(x, str)",
        "hasattr(value, 'item')",
        "getattr(torch, 'x', None)",
        "f'{type(x).__name__}'",
    ]
    for expressions, expected in ((asking, True), (harmless, False)):
        for text in expressions:
            node = ast.parse(text, mode="eval").body
            assert RULER["asks_for_class"](node, {"InPlace"}) is expected, text
