"""The worked example of docs/adding-a-method.md runs as it stands.

What docs/guarantees.md promises names tests that are there.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.config import plugins
from finetune.config.load import load
from finetune.registry import KINDS
from finetune.testing import contract

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"


def example(folder: Path, name: str = "row_scale") -> Path:
    """Write the files of the worked example as the page says, and return the folder of the plug-in.

    ``name`` replaces that of the method: a reader who follows the page may have added it to this checkout.
    """
    text = PAGE.read_text(encoding="utf-8").replace("row_scale", name)
    for heading, code in re.findall(r"\n## \d\. [^`\n]*`(mine/[^`]*)`\n.*?```\w+\n(.*?)```", text, re.DOTALL):
        file = folder / heading
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")
    return folder / "mine"


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    yield example(tmp_path, "scratch_rows")
    plugins.unload()


def test_worked_example(mine: Path) -> None:
    """The files run as they stand.

    That is the contract on its first case, the test of the page, the option of the YAML file.
    """
    assert {file.relative_to(mine).as_posix() for file in mine.rglob("*.*")} == {
        "scratch_rows.py",
        "test_scratch_rows.py",
        "conf/method/scratch_rows.yaml",
    }
    spec = importlib.util.spec_from_file_location("example_test", mine / "test_scratch_rows.py")
    assert spec is not None
    assert spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    contract.check(tests.RowScale)
    tests.test_factor_scales_a_row()
    assert load(["method=scratch_rows"]).method == tests.RowScale()


def test_the_table_of_kinds_is_complete() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| .* \| `([\w/]+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name for name, _, _ in rows} == {
        kind.name for kind in KINDS.values() if kind.folders or kind.place
    }
    for name, base, place in rows:
        kind = KINDS[name]
        if kind.folders:
            assert kind.base in base
            assert place.startswith(f"finetune/{kind.folders[0]}/")


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
