from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.settings import Config, LoggerConfig, TrainConfig
from finetune.errors import ConfigError
from finetune.storage.atomic import write_json_atomic, write_yaml_atomic
from finetune.storage.result import group_hash
from finetune.storage.run_folder import RunFolder, run_folder


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.processes
def test_import_brings_no_torch() -> None:
    names = ["system.disk", "training.tracker"]
    names += [f"storage.{name}" for name in ("atomic", "rows", "run_folder", "lock", "manifest", "result")]
    light = ", ".join(f"finetune.{name}" for name in names)
    code = f"import sys, {light}; print({{'torch', 'wandb', 'pyarrow'}} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


def test_run_folder_names(some_config: Config) -> None:
    assert run_folder(some_config) == Path("outputs/trial") / f"lora-tiny_vit-digits-s3-{some_config.hash()}"
    assert run_folder(replace(some_config, run="mine")) == Path("outputs/trial/mine")
    assert run_folder(replace(some_config, name=None)).parent.name == datetime.date.today().isoformat()


@pytest.mark.parametrize("bad", ["a/b", "..", ".hidden", "a\nb", "a\\b"])
def test_run_folder_refuses_names_that_lead_elsewhere(some_config: Config, bad: str) -> None:
    with pytest.raises(ConfigError, match="name="):
        run_folder(replace(some_config, name=bad))
    with pytest.raises(ConfigError, match="run="):
        run_folder(replace(some_config, run=bad))


def test_open_freezes_the_config_and_takes_the_same_run_again(tmp_path: Path, some_config: Config) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.open_or_check(some_config)
    assert yaml.safe_load(folder.config.read_text()) == some_config.as_dict()
    folder.open_or_check(replace(some_config, logger=LoggerConfig("none")))
    assert yaml.safe_load(folder.config.read_text())["logger"]["name"] == "none"


def test_open_names_what_differs_and_writes_nothing(tmp_path: Path, some_config: Config) -> None:
    folder = RunFolder(tmp_path)
    folder.open_or_check(some_config)
    before = folder.config.read_bytes()
    with pytest.raises(
        ConfigError,
        match=r"holds another run: seed is 3 there and 4 here, train\.steps is 200 there and 9 here\. Choose",
    ):
        folder.open_or_check(replace(some_config, seed=4, train=replace(some_config.train, steps=9)))
    assert (folder.config.read_bytes(), names(tmp_path)) == (before, ["config.yaml"])


def test_open_refuses_a_file_a_foreign_folder_and_a_broken_config(
    tmp_path: Path, some_config: Config
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file").open_or_check(some_config)
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        RunFolder(tmp_path).open_or_check(some_config)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        RunFolder(tmp_path).open_or_check(some_config)
    assert names(tmp_path) == ["config.yaml", "file"]


def test_open_says_when_it_may_not_write(tmp_path: Path, some_config: Config) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").open_or_check(some_config)


def test_a_log_may_lie_there_before_the_run(tmp_path: Path, some_config: Config) -> None:
    (tmp_path / "log.txt").write_text("starting")
    RunFolder(tmp_path).open_or_check(some_config)
    assert names(tmp_path) == ["config.yaml", "log.txt"]


def test_finished_is_what_the_result_says(tmp_path: Path, some_config: Config) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.finished
    write_json_atomic(folder.result, {"status": "failed", "format": 1})
    assert not folder.finished
    write_json_atomic(folder.result, {"status": "finished", "format": 1})
    assert folder.finished
    write_yaml_atomic(folder.config, some_config.as_dict())
    before = folder.config.stat().st_mtime_ns
    folder.open_or_check(replace(some_config, logger=LoggerConfig("none")))
    assert folder.config.stat().st_mtime_ns == before  # a finished run is not touched


def test_how_often_a_run_is_saved_makes_no_other_run(tmp_path: Path, some_config: Config) -> None:
    folder = RunFolder(tmp_path)
    folder.open_or_check(some_config)
    more = replace(some_config, train=replace(some_config.train, save_every=7, keep_last=None))
    folder.open_or_check(more)
    assert yaml.safe_load(folder.config.read_text())["train"]["save_every"] == 7
    assert (more.hash(), group_hash(more)) == (some_config.hash(), group_hash(some_config))
    for other in (
        replace(some_config, seed=4),
        replace(some_config, train=replace(some_config.train, eval_every=7)),
    ):
        assert other.hash() != some_config.hash()
        with pytest.raises(ConfigError, match="holds another run"):
            folder.open_or_check(other)


def test_what_was_frozen_before_a_setting_was_known_is_the_same_run(
    tmp_path: Path, some_config: Config
) -> None:
    tree = some_config.as_dict()
    del tree["train"]["keep_last"]
    write_yaml_atomic(tmp_path / "config.yaml", tree)
    RunFolder(tmp_path).open_or_check(some_config)


def test_checkpoints_are_known_by_their_steps_and_not_by_the_clock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.steps() == []
    others = ["step-", "step--1", "step-1e3", "step-007", ".step-5.1.tmp", f"step-{'9' * 30}"]
    for i, name in enumerate(["step-10", "step-9", "step-100", "step-0", *others]):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        os.utime(tmp_path / "checkpoints" / name, (10**9 - i, 10**9 - i))  # each older than the one before it
    assert folder.steps() == [0, 9, 10, 100]


@pytest.mark.parametrize(
    ("text", "step"),
    [('{"checkpoint": "step-12"}', 12), ('{"checkpoint": 12}', None), ("[", None), (None, None)],
)
def test_the_checkpoint_of_a_failure(tmp_path: Path, text: str | None, step: int | None) -> None:
    if text:
        (tmp_path / "failure.json").write_text(text)
    assert RunFolder(tmp_path).failed_at() == step


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 99}'])
def test_a_result_that_cannot_be_used_is_the_users_fault(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=r"result\.json"):
        RunFolder(tmp_path).read_result()


def test_a_newer_setting_that_is_not_used_leaves_the_hash(some_config: Config) -> None:
    before = some_config.as_dict()
    for part, key in (
        (before, "name"),
        (before, "run"),
        (before, "logger"),
        (before, "objective"),
        (before, "streams"),
        *((before["model"], key) for key in ("init", "config", "zeros")),
        *((before["train"], key) for key in ("save_every", "keep_last", "patience")),
    ):
        del part[key]
    assert some_config.hash() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:10]
    assert replace(some_config, train=replace(some_config.train, patience=3)).hash() != some_config.hash()


@pytest.mark.parametrize("other", [{"eval_every": None}, {"select": "last"}])
def test_patience_without_validations_that_decide_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train.patience=2 has no effect with train\.\w+=\w+ \("):
        TrainConfig(patience=2, **other)
