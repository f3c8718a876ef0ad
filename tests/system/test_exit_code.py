"""Errors become one message each and the documented exit codes: 0, 1 for a failed run, 2 for a mistake."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import ConfigError, FinetuneError, RunFailed
from finetune.system.exit_code import exit_code_of, print_line


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("a is wrong", "b is wrong"), 2, ["Error: a is wrong", "Error: b is wrong"]),
        (RunFailed("The loss is nan"), 1, ["Error: The loss is nan"]),
        (FinetuneError("two\nlines"), 1, ["Error: two lines"]),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300),
            2,
            [f"Error: {'n' * 60}... is too long for the name of a file or folder. Give a shorter one."],
        ),
    ],
)
def test_an_expected_error_is_printed_without_its_traceback(
    error: Exception, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(raising(error)) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_an_action_that_raises_nothing_decides_the_code_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert [exit_code_of(lambda code=code: code) for code in (0, 1, 130)] == [0, 1, 130]
    assert capsys.readouterr().err == ""


def test_the_traceback_of_an_unexpected_error_is_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_code_of(raising(KeyError("x"))) == 1
    [line] = capsys.readouterr().err.splitlines()
    [log] = tmp_path.iterdir()
    assert line == (
        f"Error: finetune failed unexpectedly: KeyError: 'x' (details in {log}; FINETUNE_DEBUG=1 shows them)"
    )
    assert log.read_text().startswith("Traceback")


def test_an_unexpected_error_is_raised_for_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DEBUG", "1")
    with pytest.raises(KeyError):
        exit_code_of(raising(KeyError("x")))
    assert exit_code_of(raising(RunFailed("expected"))) == 1


def test_only_rank_0_prints_what_every_rank_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    print_line("the same in every rank")
    print_line("of this rank's disk", every_rank=True)
    exit_code_of(raising(RunFailed("the same in every rank")))
    try:
        raise RunFailed("its disk is full") from OSError(errno.ENOSPC, "No space left on device")
    except RunFailed as error:
        exit_code_of(raising(error))
    assert capsys.readouterr().err.splitlines() == [
        "Process 3: of this rank's disk",
        "Process 3: Error: its disk is full",
    ]
