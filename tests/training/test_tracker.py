from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.settings import Config, LoggerConfig
from finetune.storage.run_folder import RunFolder
from finetune.training import tracker
from finetune.training.tracker import make_tracker

BLOCK = 32768
RESULT = {
    "status": "finished",
    "metrics": {"test": {"accuracy": 0.75}},
    "cost": {"train_seconds": 2.0},
    "versions": {"torch": "x"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = RunFolder(tmp_path / "outputs" / "trial" / "r1")
    folder.path.mkdir(parents=True)
    return folder


def with_logger(config: Config, name: Any) -> Config:
    return replace(config, logger=replace(config.logger, name=name))


def metrics(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def chunks(log: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind (1 whole, 2 first, 3 middle, 4 last) and bytes of each chunk of a W&B file.

    The file is in LevelDB's log format behind a header of 7 bytes.
    """
    at = 7
    while at + 7 < len(log):
        if BLOCK - at % BLOCK < 7:  # no chunk begins in what is left of the block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        if at + 7 + length > len(log):
            return
        yield kind, log[at + 7 : at + 7 + length]
        at += 7 + length


def read(path: Path) -> list[Any]:
    """Return the records of a W&B file as far as it is written."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, data = [], b""
    for kind, chunk in chunks(path.read_bytes()):
        data += chunk
        if kind in (1, 4):
            found.append(Record.FromString(data))
            data = b""
    return found


def records(folder: RunFolder) -> list[Any]:
    """Return the records of the one offline W&B run of this folder.

    W&B's own process writes the last of them a little after ``finish``.
    """
    (path,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(600):
        found = read(path)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(path)


def test_none_writes_nothing(folder: RunFolder, some_config: Config) -> None:
    track = make_tracker(with_logger(some_config, "none"), folder, pytest.fail)
    track.log(1, loss=1.0)
    track.finish(RESULT)
    assert list(folder.path.iterdir()) == []


def test_jsonl_resumes(folder: RunFolder, some_config: Config) -> None:
    track = make_tracker(some_config, folder, pytest.fail)
    for step in (1, 2, 3):
        track.log(step, loss=1.0)
    track.finish(RESULT)
    track = make_tracker(some_config, folder, pytest.fail, start=2)
    track.log(3, loss=2.0)
    track.finish(RESULT)
    assert metrics(folder) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}]


@pytest.mark.processes
def test_wandb_offline_run_holds_what_a_grid_needs(folder: RunFolder, some_config: Config) -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    said: list[str] = []
    track = make_tracker(with_logger(some_config, "wandb"), folder, said.append)
    track.log(1, loss=1.5)
    track.log(2, loss=1.25)
    track.finish(RESULT)
    assert random.random() == expected  # the logger leaves the run's random numbers alone
    assert said == []
    assert [line["loss"] for line in metrics(folder)] == [1.5, 1.25]
    found = records(folder)
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("finetune", "grid", "lora", "r1")
    assert {"mine", "tiny_vit", "digits"} <= set(run.tags)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["method"] == {"name": "lora", "rank": 4, "alpha": 1e-5}
    assert config["config_hash"] == some_config.hash()
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss"]) for row in history] == [(1, 1.5), (2, 1.25)]
    summary: dict[str, Any] = {}
    for record in found:
        summary |= {
            "/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json)
            for item in record.summary.update
        }
    assert (summary["test/accuracy"], summary["cost/train_seconds"], summary["status"]) == (
        0.75,
        2.0,
        "finished",
    )
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]


@pytest.mark.processes
def test_a_failed_run_is_marked_failed(folder: RunFolder, some_config: Config) -> None:
    make_tracker(with_logger(some_config, "wandb"), folder, pytest.fail).finish({"status": "failed"})
    assert [record.exit.exit_code for record in records(folder) if record.HasField("exit")] == [1]


@pytest.mark.processes
def test_a_resumed_run_is_the_same_run_at_wandb(folder: RunFolder, some_config: Config) -> None:
    settings = with_logger(some_config, "wandb")
    make_tracker(settings, folder, pytest.fail).finish({"status": "interrupted"})
    assert [record.exit.exit_code for record in records(folder) if record.HasField("exit")] == [
        255
    ]  # W&B: killed
    id_ = json.loads((folder.path / "wandb.json").read_text())["id"]
    for name in ("wandb", "moved"):
        (folder.path / "wandb").rename(
            folder.path / f"before-{name}"
        )  # the folders of W&B have a second in their names, and would meet
        make_tracker(settings, folder, pytest.fail, start=1).finish(RESULT)
        assert {record.run.run_id for record in records(folder) if record.HasField("run")} == {id_}
    (folder.path / "wandb.json").write_text(json.dumps({"id": "../../etc"}))
    assert re.fullmatch(r"[0-9a-f]{12}", tracker._read_or_draw_id(folder))
    assert tracker._read_or_draw_id(folder) == tracker._read_or_draw_id(folder)


@pytest.mark.processes
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_whatever_wandb_raises_costs_one_line(
    folder: RunFolder, some_config: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import wandb

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk on fire\nand more")

    class Run:
        summary: dict[str, Any] = {}  # noqa: RUF012
        log = broken if where == "log" else staticmethod(lambda *_, **__: None)
        finish = broken if where == "finish" else staticmethod(lambda *_, **__: None)

    monkeypatch.setattr(wandb, "init", broken if where == "init" else lambda **_: Run())
    said: list[str] = []
    track = make_tracker(with_logger(some_config, "wandb"), folder, said.append)
    for step in (1, 2):
        track.log(step, loss=1.0)
    track.finish(RESULT)
    assert len(said) == 1
    assert "OSError: disk on fire" in said[0]
    assert "\n" not in said[0]
    assert len(metrics(folder)) == 2


@pytest.mark.processes
def test_wandb_is_offline_without_a_login(
    folder: RunFolder, some_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    asked: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options["mode"]))
    make_tracker(with_logger(some_config, "wandb"), folder, pytest.fail)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    make_tracker(with_logger(some_config, "wandb"), folder, pytest.fail)
    assert asked == ["offline", "online"]


@pytest.mark.processes
def test_a_network_that_never_answers_holds_up_nothing(
    folder: RunFolder, some_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts connections and stays silent: the run is logged offline after the time limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(tracker, "INIT_SECONDS", 1.0)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.delenv("WANDB_MODE")
        import wandb

        wandb.teardown()  # settings are read once per process
        said: list[str] = []
        started = time.monotonic()
        track = make_tracker(with_logger(some_config, "wandb"), folder, said.append)
        track.log(1, loss=1.0)
        track.finish(RESULT)
        wandb.teardown()
        assert time.monotonic() - started < 60  # left to itself, W&B would wait for 90 s
    assert len(said) == 1
    assert "offline" in said[0]
    assert len(metrics(folder)) == 1
    assert list(folder.path.glob("wandb/offline-run-*"))


def test_logger_settings_default_to_jsonl() -> None:
    assert LoggerConfig().name == "jsonl"
