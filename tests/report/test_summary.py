from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.report.metric import show_bytes
from finetune.report.summary import summary

Make = Callable[..., dict[str, Any]]
FOLDER = Path("outputs/2026-01-01/snell-tiny_vit-digits-s0-0123456789")


def test_summary_says_everything_that_the_issue_promises(result: Make) -> None:
    text = summary(result(), FOLDER)
    for fact in (
        "snell on digits with tiny_vit, seed 0: finished after 200 steps, best on validation at step 150.",
        "10.25 % before, 96.31 % after (accuracy on the test set)",
        "35,082 of 1,012,234 parameters (3.47 %)",
        "144,592 bytes (141.2 KiB)",
        "512.0 MiB (whole process)",
        "0.0312 seconds per step, 12.3 seconds of training",
        f"everything in  {FOLDER}",
        f"Next: finetune eval ckpt={FOLDER}",
        f"finetune merge ckpt={FOLDER} out=merged",
    ):
        assert fact in text


def test_summary_of_a_language_model_names_retention(result: Make) -> None:
    values = {"base": 2.5, "test": 1.25, "retention": 3.0, "base_retention": 2.875}
    text = summary(
        result(
            metrics={split: {"bits_per_byte": value, "perplexity": 9.0} for split, value in values.items()}
        ),
        FOLDER,
    )
    assert "2.5000 before, 1.2500 after (bits per byte on the test set)" in text
    assert "2.8750 before, 3.0000 after (bits per byte on what it should not forget)" in text
    assert "%" not in text.replace("(3.47 %)", "")


def test_summary_of_a_failed_run_points_to_the_log(result: Make) -> None:
    text = summary(
        result(
            status="failed",
            error="the loss became NaN at step 3",
            metrics={},
            params=None,
            cost=None,
            stored_bytes=None,
            steps=3,
        ),
        FOLDER,
    )
    assert "failed after 3 steps: the loss became NaN at step 3" in text
    assert str(FOLDER / "log.txt") in text
    assert "finetune eval" not in text


@pytest.mark.parametrize("folder", [Path("outputs/a=b/run"), Path("outputs/my runs/r")])
def test_the_next_command_survives_the_shell_and_the_grammar(result: Make, folder: Path) -> None:
    line = next(line for line in summary(result(), folder).splitlines() if line.startswith("Next: "))
    assert shlex.split(line.removeprefix("Next: ")) == ["finetune", "eval", "--ckpt", str(folder)]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB")],
)
def test_show_bytes(count: int, text: str) -> None:
    assert show_bytes(count) == text


def test_reports_import_no_torch() -> None:
    code = "import sys, finetune.report.summary; print({'torch', 'rich.table', 'yaml'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )
