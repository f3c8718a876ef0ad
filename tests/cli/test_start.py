"""How the command starts: importing little, and without a traceback where something breaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import finetune

pytestmark = pytest.mark.processes

ENV = {**os.environ, "COLUMNS": "160"}


def test_light_modules_stay_light() -> None:
    code = (
        "import sys, finetune.cli.app, finetune.registry, finetune.config.load, finetune.sweep\n"
        "finetune.registry.catalog('method')\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "datasets", "accelerate", "wandb", "peft", "sklearn"} & set(loaded)


def test_help_and_version() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "finetune", "--help"], env=ENV, capture_output=True, text=True, check=True
    ).stdout
    commands = (
        "train",
        "eval",
        "merge",
        "inspect",
        "compose",
        "sweep",
        "compare",
        "reproduce",
        "methods",
        "show",
    )
    assert all(name in said for name in (*commands, "--version"))
    version = subprocess.run(
        [sys.executable, "-m", "finetune", "--version"], env=ENV, capture_output=True, text=True, check=True
    ).stdout
    assert version == f"finetune {finetune.__version__}\n"


def test_unexpected_errors_are_one_line(tmp_path: Path) -> None:
    code = """
import sys, finetune.cli.app, finetune.registry
def broken(kind): raise OSError("disk\\ngone")
finetune.registry.catalog = broken
sys.argv = ["finetune", "methods"]
finetune.cli.app.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: finetune failed unexpectedly: OSError: disk gone (details in ")
    assert done.stderr.count("\n") == 1
    (log,) = tmp_path.iterdir()
    assert "Traceback" in log.read_text()
    loud = subprocess.run(
        [sys.executable, "-c", code], env=ENV | {"FINETUNE_DEBUG": "1"}, capture_output=True, text=True
    )
    assert "Traceback" in loud.stderr
