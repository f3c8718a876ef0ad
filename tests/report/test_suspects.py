"""The notes of ``compare`` about runs that should not be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.report.comparison import compare

from ..support.run_folders import MakeRun

IDENTICAL = (
    "the methods have different settings, but their predictions are identical to the bit. "
    "A setting may have had no effect"
)


def find_notes(folder: Path) -> list[str]:
    return [note for note in compare([folder]).notes if "suspect" in note or IDENTICAL in note]


def test_methods_that_answer_the_same_to_the_bit_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    same = [make_run("lora", 1, [1, 1, 0, 1], method__rank=4), make_run("snell", 1, [1, 1, 0, 1])]
    make_run("lora", 2, [1, 0, 0, 1], method__rank=4)
    make_run("snell", 2, [1, 1, 1, 1])  # another seed
    (note,) = find_notes(tmp_path)
    assert note.endswith(f": {IDENTICAL}.")
    assert all(str(path.relative_to(tmp_path)) in note for path in same)


def test_a_setting_of_the_method_without_effect_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 1, [1, 0, 1], method__alpha=1.0)
    make_run("lora", 1, [1, 0, 1], method__alpha=2.0)
    assert len(find_notes(tmp_path)) == 1


@pytest.mark.parametrize("settings", [{"train__workers": 2}, {"optimizer__eps": 1e-7}])
def test_other_settings_may_have_no_effect(
    make_run: MakeRun, tmp_path: Path, settings: dict[str, object]
) -> None:
    make_run("lora", 1, [1, 0, 1])
    make_run("lora", 1, [1, 0, 1], **settings)
    make_run("snell", 2, [1, 0, 1])  # another seed, which may give the same answers
    make_run("head", 1, status="failed")
    assert find_notes(tmp_path) == []


def test_the_suspicions_that_a_run_recorded_are_listed(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("lora", 1, [1, 0, 1], result={"suspect": ["it did not act", 3], "warnings": ["odd"]})
    make_run("head", 1, [1, 1, 1], result={"suspect": "no list"})
    (note,) = find_notes(tmp_path)
    assert note.endswith(f"{path.relative_to(tmp_path)} is suspect: it did not act.")
