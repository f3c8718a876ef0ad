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

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from finetune.config.settings import Config, LoggerConfig, TrainConfig
from finetune.errors import ConfigError
from finetune.storage.result import group_hash
from finetune.storage.run_folder import (
    MetricsFile,
    RunFolder,
    replacing,
    run_folder,
    write_json_atomic,
    write_predictions,
    write_yaml,
)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_import_brings_no_torch() -> None:
    names = ["system.disk", "training.tracker"]
    names += [f"storage.{name}" for name in ("run_folder", "lock", "manifest", "result")]
    light = ", ".join(f"finetune.{name}" for name in names)
    code = f"import sys, {light}; print({{'torch', 'wandb', 'pyarrow'}} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


def test_json_is_strict_and_plain(tmp_path: Path) -> None:
    write_json_atomic(
        tmp_path / "a.json",
        {
            "nan": float("nan"),
            "inf": np.inf,
            "n": np.int64(3),
            "x": np.float32(0.5),
            "t": (1, 2),
            "p": Path("q"),
        },
    )
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": None,
        "inf": None,
        "n": 3,
        "x": 0.5,
        "t": [1, 2],
        "p": "q",
    }


def test_yaml_round_trip_keeps_order_and_values(tmp_path: Path) -> None:
    tree = {"z": 1e-5, "a": {"on": True, "text": "on", "none": None, "list": [1, 2.5]}, "ü": "naïve"}
    write_yaml(tmp_path / "c.yaml", tree)
    back = yaml.safe_load((tmp_path / "c.yaml").read_text(encoding="utf-8"))
    assert back == tree
    assert list(back) == list(tree)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"new": object()})

    def break_off() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_the_bytes_are_synced_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(handle: int) -> None:
        done.append("sync")
        real_sync(handle)

    def rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    write_json_atomic(tmp_path / "a.json", {})
    assert done == ["sync", "rename", "sync"]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for step in (1, 2):
        with replacing(tmp_path / "state") as temporary:
            temporary.mkdir()
            (temporary / f"part-{step}").write_text("x")
    assert names(tmp_path) == ["state"]
    assert names(tmp_path / "state") == ["part-2"]


def test_predictions_have_the_types_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_predictions(
        path,
        [
            {"id": "a", "label": np.int32(1), "prediction": 2, "score": np.float32(0.25)},
            {"id": "b", "label": 0, "prediction": 0, "score": 1},
        ],
    )
    table = pq.read_table(path)
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "string",
        "label": "int64",
        "prediction": "int64",
        "score": "double",
    }
    assert table.to_pylist()[0] == {"id": "a", "label": 1, "prediction": 2, "score": 0.25}
    write_predictions(path, [{"id": "w", "loss": 12.5, "bytes": 40}])
    assert pq.read_table(path).to_pylist() == [{"id": "w", "loss": 12.5, "bytes": 40}]


@pytest.mark.parametrize("rows", [[], [{"id": "a", "extra": 1}], [{"id": "a", "label": 1}, {"id": "b"}]])
def test_predictions_refuse_what_the_contract_does_not_know(
    tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    with pytest.raises(ValueError, match="predictions need"):
        write_predictions(tmp_path / "p.parquet", rows)
    assert names(tmp_path) == []


def test_metrics_grow_by_lines_and_resume_drops_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (0, 5, 10, 15):
        first.append(step, {"loss": 1 / (step + 1)})
    with path.open("a") as file:
        file.write('{"step": 7, "lo')  # a process that was killed
    again = MetricsFile(path, start=10)
    again.append(11, {"loss": float("inf")})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10, 11]
    assert lines[-1]["loss"] is None
    MetricsFile(path)
    assert path.read_text() == ""


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
    write_yaml(folder.config, some_config.as_dict())
    before = folder.config.stat().st_mtime_ns
    folder.open_or_check(replace(some_config, logger=LoggerConfig("none")))
    assert folder.config.stat().st_mtime_ns == before  # a finished run is not touched


def test_files_are_as_readable_as_any_other_that_the_user_makes(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "folder") as folder:
        folder.mkdir()
        (folder / "weights").touch(mode=0o600)
    assert (tmp_path / "folder" / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


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
    write_yaml(tmp_path / "config.yaml", tree)
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


def test_metrics_that_a_power_cut_left_are_dropped_where_they_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe\x00{"step": 2}\n{"step": 2, "loss": 1}\n\x00\x00\x00')
    MetricsFile(path, start=2)
    assert path.read_text() == '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'


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
        *((before["train"], key) for key in ("save_every", "keep_last", "patience")),
    ):
        del part[key]
    assert some_config.hash() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:10]
    assert replace(some_config, train=replace(some_config.train, patience=3)).hash() != some_config.hash()


@pytest.mark.parametrize("other", [{"eval_every": None}, {"select": "last"}])
def test_patience_without_validations_that_decide_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train.patience=2 means nothing to train\.\w+=\w+, which"):
        TrainConfig(patience=2, **other)
