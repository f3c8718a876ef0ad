"""What ``compare`` says of runs that should not be trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.report.comparison import compare

Make = Callable[..., Path]
SAME = "settings of the method differ and every prediction is the same to the bit, so one of them may have had no effect"


def notes(folder: Path) -> list[str]:
    return [note for note in compare([folder]).notes if "suspect" in note or SAME in note]


def test_methods_that_answer_the_same_to_the_bit_are_named(made: Make, tmp_path: Path) -> None:
    same = [made("lora", 1, [1, 1, 0, 1], method__rank=4), made("snell", 1, [1, 1, 0, 1])]
    made("lora", 2, [1, 0, 0, 1], method__rank=4)
    made("snell", 2, [1, 1, 1, 1])  # of another seed
    (note,) = notes(tmp_path)
    assert note.endswith(f": {SAME}.")
    assert all(str(path.relative_to(tmp_path)) in note for path in same)


def test_a_setting_of_the_method_that_did_nothing_is_named(made: Make, tmp_path: Path) -> None:
    made("lora", 1, [1, 0, 1], method__alpha=1.0)
    made("lora", 1, [1, 0, 1], method__alpha=2.0)
    assert len(notes(tmp_path)) == 1


@pytest.mark.parametrize("settings", [{"train__workers": 2}, {"optimizer__eps": 1e-7}])
def test_other_settings_may_do_nothing(made: Make, tmp_path: Path, settings: dict[str, object]) -> None:
    made("lora", 1, [1, 0, 1])
    made("lora", 1, [1, 0, 1], **settings)
    made("snell", 2, [1, 0, 1])  # another seed, with the same few answers
    made("head", 1, status="failed")
    assert notes(tmp_path) == []


def test_what_a_run_says_of_itself_is_passed_on(made: Make, tmp_path: Path) -> None:
    path = made("lora", 1, [1, 0, 1], told={"suspect": ["it did not act", 3], "warnings": ["odd"]})
    made("head", 1, [1, 1, 1], told={"suspect": "no list"})
    (note,) = notes(tmp_path)
    assert note.endswith(f"{path.relative_to(tmp_path)} is suspect: it did not act.")
