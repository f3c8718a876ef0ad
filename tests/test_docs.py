"""The worked example of docs/adding-a-method.md runs as it stands, and what docs/guarantees.md promises names tests that are there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"


def _load(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = folder / f"{name.replace('.', '_')}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, test = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    _load("finetune.methods.row_scale", method, tmp_path, monkeypatch)
    tests = _load("example_test", test, tmp_path, monkeypatch)
    names = [name for name in vars(tests) if name.startswith("test_")]
    assert names == ["test_contract", "test_factor_scales_a_row"]
    for name in names:
        getattr(tests, name)()


def test_every_promise_names_its_test() -> None:
    rows = [
        line
        for line in PAGE.with_name("guarantees.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(test_\w+))?`", row.split(" | ")[1])
        assert named, row
        for file, test in named:
            source = (Path(__file__).parent / file).read_text()
            assert not test or f"def {test}(" in source, f"{file}::{test}"
