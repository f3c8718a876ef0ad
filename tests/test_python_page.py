"""The page on Python is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/guides/python.md"


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    shown = re.search(r"([\d.]+) -> ([\d.]+), [\d,]+ trained", capsys.readouterr().out)
    assert shown
    assert float(shown[2]) < 0.7 * float(shown[1])
    for file in (
        "delta/delta.safetensors",
        "trained/delta.safetensors",
        "outputs/notebook/first/result.json",
    ):
        assert Path(file).is_file()
