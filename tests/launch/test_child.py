"""One function trains a run for the command line and for a sweep's children, and returns the exit code."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import load
from finetune.config.settings import Config
from finetune.launch import child
from finetune.launch.start import NO_OPTIONS, StartOptions, run_child
from finetune.storage.run_folder import RunFolder, run_folder

from ..support.tiny_model import TINY

SETTINGS = [
    "method=head",
    "train.steps=1",
    "train.batch_size=8",
    "train.eval_every=null",
    "train.threads=1",
    "train.device=cpu",
    "dataset.retention_images=0",
    "name=n",
    *TINY,
]


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder of a sweep that holds a configuration and nothing else."""
    monkeypatch.chdir(tmp_path)
    config = load(SETTINGS)
    folder = RunFolder(run_folder(config))
    folder.open_or_check(replace(config, run=folder.path.name))
    return folder


def test_a_frozen_configuration_is_trained_in_its_folder(
    frozen: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_child(child.train_frozen, NO_OPTIONS, str(frozen.config)) == 0
    assert frozen.read_result()["status"] == "finished"
    written = frozen.result.read_bytes()
    assert run_child(child.train_frozen, NO_OPTIONS, str(frozen.config)) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "already holds the finished result of this run" in err
    assert frozen.result.read_bytes() == written


def test_a_damaged_configuration_is_a_mistake(frozen: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    frozen.config.write_text("method: [", encoding="utf-8")
    assert run_child(child.train_frozen, NO_OPTIONS, str(frozen.config)) == 2
    assert capsys.readouterr().err.startswith("Error: ")
    assert not frozen.result.exists()


def test_a_loss_that_is_not_finite_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(["train.steps=4", "optimizer.lr=1e38", *SETTINGS[:1], *SETTINGS[2:]])

    def action(options: StartOptions) -> int:
        return child.train(lambda: (config, run_folder(config)), options)

    assert run_child(action, NO_OPTIONS) == 1
    assert "Error: The loss is " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_returns_130_and_says_how_to_resume(
    frozen: RunFolder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = load([], None, frozen.config)

    def preview(_: Config) -> None:
        os.kill(os.getpid(), signal.Signals[name])

    assert child.train(lambda: (config, frozen.path), NO_OPTIONS, processes=2, preview=preview) == 130
    assert capsys.readouterr().err == (
        f"Stopped by {name}. To continue: finetune train --resume {frozen.path} --processes 2\n"
    )


def test_the_report_gets_the_result_and_a_preview_replaces_the_training(frozen: RunFolder) -> None:
    config, shown, reported = load([], None, frozen.config), list[Config](), list[tuple[Any, Path]]()

    def report(result: dict[str, Any], folder: Path) -> None:
        reported.append((result, folder))

    def read() -> tuple[Config, Path]:
        return config, frozen.path

    assert child.train(read, NO_OPTIONS, report=report, preview=shown.append) == 0
    assert (shown, reported, frozen.log.exists()) == ([config], [], False)
    assert child.train(read, NO_OPTIONS, report=report) == 0
    assert reported == [(json.loads(frozen.result.read_text()), frozen.path)]


def test_start_options_survive_the_command_line_of_a_child() -> None:
    for options in (NO_OPTIONS, StartOptions(plugins=("/a b/c", "/d"))):
        assert StartOptions.from_json(options.to_json()) == options
