"""The summary of a run's result: what it says, and that its commands can be pasted into a shell."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.report.metric import show_bytes
from finetune.report.summary import describe_result

FOLDER = Path("outputs/2026-01-01/snell-tiny_vit-digits-s0-0123456789")


def make_result(**changes: Any) -> dict[str, Any]:
    """Return a result as result.json holds it."""
    result = {
        "status": "finished",
        "error": None,
        "method": "snell",
        "model": "tiny_vit",
        "model_path": "builtin:tiny_vit",
        "dataset": "digits",
        "seed": 0,
        "metrics": {
            "base": {"accuracy": 0.1025, "loss": 2.3},
            "val": {"accuracy": 0.9, "loss": 0.3},
            "test": {"accuracy": 0.9631, "loss": 0.2},
        },
        "params": {"trained": 35_082, "adapted": 800_000, "total": 1_012_234},
        "stored_bytes": 144_592,
        "cost": {
            "step_seconds_median": 0.03125,
            "train_seconds": 12.34,
            "peak_memory_bytes": 512 << 20,
            "peak_memory_kind": "process_rss",
        },
        "steps": 200,
        "best_step": 150,
        "group_hash": "aaaaaaaaaa",
    }
    return result | changes


def test_the_summary_has_every_fact_of_a_finished_run() -> None:
    text = describe_result(make_result(), FOLDER)
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


def test_merging_is_suggested_only_for_methods_that_can_be_merged() -> None:
    assert "finetune merge" not in describe_result(make_result(method="adapter"), FOLDER)
    assert "finetune merge" in describe_result(make_result(method="of_a_plugin_that_is_gone"), FOLDER)


def test_the_summary_of_a_language_model_names_retention() -> None:
    values = {"base": 2.5, "test": 1.25, "retention": 3.0, "base_retention": 2.875}
    metrics = {split: {"bits_per_byte": value, "perplexity": 9.0} for split, value in values.items()}
    text = describe_result(make_result(metrics=metrics), FOLDER)
    assert "2.5000 before, 1.2500 after (bits per byte on the test set)" in text
    assert "2.8750 before, 3.0000 after (bits per byte on what it should not forget)" in text
    assert "%" not in text.replace("(3.47 %)", "")


def test_the_summary_of_a_failed_run_points_to_the_log() -> None:
    nothing = {"metrics": {}, "params": None, "cost": None, "stored_bytes": None}
    result = make_result(status="failed", error="the loss became NaN at step 3", steps=3, **nothing)
    text = describe_result(result, FOLDER)
    assert "failed after 3 steps: the loss became NaN at step 3" in text
    assert str(FOLDER / "log.txt") in text
    assert "finetune eval" not in text


@pytest.mark.parametrize("folder", [Path("outputs/a=b/run"), Path("outputs/my runs/r")])
def test_the_next_command_survives_the_shell_and_the_grammar_of_overrides(folder: Path) -> None:
    lines = describe_result(make_result(), folder).splitlines()
    line = next(line for line in lines if line.startswith("Next: "))
    assert shlex.split(line.removeprefix("Next: ")) == ["finetune", "eval", "--ckpt", str(folder)]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB")],
)
def test_bytes_are_shown_in_readable_units(count: int, text: str) -> None:
    assert show_bytes(count) == text


@pytest.mark.processes
def test_a_summary_imports_neither_torch_nor_rich_nor_yaml() -> None:
    code = "import sys, finetune.report.summary; print({'torch', 'rich.table', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
