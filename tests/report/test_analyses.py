"""Results of analyses in a comparison: their means, what is missing, and files that are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.report.comparison import compare
from finetune.report.formats import write_markdown

from ..support.run_folders import MakeRun


def store(run: Path, name: str, summary: dict[str, Any], others: tuple[str, ...] = (), **more: Any) -> Path:
    file = run / "analysis" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    subjects = [{"run": str(path), "step": 4} for path in (run, *others)]
    content = {"format": 1, "analysis": name.partition(".")[0], "options": {}, "subjects": subjects}
    file.write_text(json.dumps({**content, "summary": summary, **more}))
    return file


def compare_all(tmp_path: Path) -> dict[str, Any]:
    return compare([tmp_path / "outputs" / "sweep"]).as_dict()


def test_means_over_the_runs_of_a_row_and_what_is_missing(make_run: MakeRun, tmp_path: Path) -> None:
    first, second, third = (make_run("lora", seed) for seed in range(3))
    other = make_run("head")
    store(first, "geometry", {"density": 0.25, "worst": "q", "flat": True})
    store(third, "geometry", {"density": 0.75, "worst": "k", "flat": False})
    found = compare_all(tmp_path)
    lora, head = sorted(found["analyses"], key=lambda item: item["row"] != "lora")
    assert (lora["analysis"], lora["summary"]) == ("geometry", {"density": 0.5, "flat": 0.5})
    assert [result["run"] for result in lora["results"]] == [str(first), str(third)]
    assert lora["results"][0]["summary"]["worst"] == "q"
    assert lora["missing"] == [str(second)]
    assert (head["results"], head["missing"]) == ([], [str(other)])
    line = "Analysis geometry, lora: density 0.5, flat 0.5 (mean of 2 results). It is missing for"
    assert f"{line} {second.name}." in found["notes"]
    assert f"Analysis geometry, head: It is missing for {other.name}." in found["notes"]
    assert "mean of 2 results" in write_markdown(found)


def test_several_partners_of_one_run_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("lora")
    store(run, "lmc.n.one", {"barrier": 0.5}, ("outputs/n/one",))
    assert any("barrier 0.5 (with one)" in note for note in compare_all(tmp_path)["notes"])
    store(run, "lmc.n.two", {"barrier": 1.5}, ("outputs/n/two",), options={"points": 3})
    (lmc,) = compare_all(tmp_path)["analyses"]
    assert [result["others"] for result in lmc["results"]] == [["outputs/n/one"], ["outputs/n/two"]]
    assert lmc["summary"] == {"barrier": 1.0}
    assert any("mean of 2 results of different options" in note for note in compare_all(tmp_path)["notes"])


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"analysis": 1, "options": {}, "subjects": [], "summary": {}}',
        '{"analysis": "x", "options": {}, "subjects": [], "summary": {}}',
        '{"format": 99, "analysis": "x", "options": {}, "subjects": [{"run": "r"}], "summary": {}}',
        '{"analysis": "%s", "options": {}, "subjects": [{"run": "r"}], "summary": {}}' % ("x" * 99),
    ],
)
def test_a_damaged_file_or_a_link_is_left_out(text: str, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("lora")
    outside = store(make_run("head", into="elsewhere"), "geometry", {"density": 1.0})
    store(run, "bad", {}).write_text(text)
    (run / "analysis" / "geometry.json").symlink_to(outside)
    found = compare_all(tmp_path)
    assert found["analyses"] == []
    assert not any("Analysis" in note for note in found["notes"])


def test_a_comparison_without_analyses_says_nothing_of_them(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora")
    found = compare_all(tmp_path)
    assert found["analyses"] == []
    assert not any("nalys" in note for note in found["notes"])
