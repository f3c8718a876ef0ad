"""Tuning: equally many trials for each configuration, judged on validation, on one seed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.sweep import grid, tune
from finetune.sweep.grid import Point

from . import fake_training
from .fake_training import FakePool, accuracy

GRID = ["method=head,bitfit", "seed=3,4", "train.steps=4", "name=t"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fake_training, "started", [])


def quiet(line: str) -> None:
    """Say nothing."""


def tuned(points: list[Point], parameter: str = "optimizer.lr", trials: int = 5) -> list[Point]:
    tuning = tune.plan(points, parameter, trials)
    grid.freeze(tuning.trials)
    return tuning.settle(FakePool(1, quiet).run(tuning.trials), quiet)


def read_tuning(point: Point) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((point.folder.path / "tuning.json").read_text())
    return found


@pytest.mark.parametrize(
    ("text", "center", "trials", "expected"),
    [
        ("optimizer.lr", 0.01, 5, [0.001, 0.00316, 0.01, 0.0316, 0.1]),
        ("optimizer.lr", 0.01, 3, [0.00316, 0.01, 0.0316]),
        ("optimizer.lr", 0.01, 2, [0.00316, 0.01]),
        ("optimizer.lr", 0.01, 1, [0.01]),
        ("optimizer.lr:1e-4:1e-2", 5.0, 3, [0.0001, 0.001, 0.01]),
        ("optimizer.lr:1e-4:1e-2", 5.0, 5, [0.0001, 0.000316, 0.001, 0.00316, 0.01]),
        ("optimizer.lr:1e-4:1e-2", 5.0, 1, [0.001]),
        ("method.rank:2:32", 8, 5, [2, 4, 8, 16, 32]),
    ],
)
def test_values(text: str, center: float, trials: int, expected: list[float]) -> None:
    found = tune.parse(text).values(center, trials)
    assert found == expected
    assert all(type(value) is type(center) for value in found)


@pytest.mark.parametrize(
    "text", ["", "a:1", "a:1:2:3", "a:x:y", "a:2:1", "a:0:1", "a:-1:1", "a:1:inf", "a:nan:1"]
)
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match=f"tune={text}"):
        tune.parse(text)


@pytest.mark.parametrize(
    ("words", "parameter", "trials", "fault"),
    [
        (GRID, "optimizer.lrr", 3, "tune=optimizer.lrr: method=head has no such setting"),
        (GRID, "method.rank", 3, "method=head has no such setting"),
        (GRID, "optimizer.weight_decay", 3, "has no logarithm"),
        (GRID, "optimizer.name", 3, "has no logarithm"),
        (GRID, "optimizer.warmup:0.5:5", 2, "optimizer.warmup=5"),
        (["method=lora", "name=t"], "method.rank:1:3", 5, "too few for 5 trials"),
        ([*GRID, "optimizer.lr=0.1,0.2"], "optimizer.lr", 3, "the grid sets optimizer.lr=0.1, 0.2, too"),
        (["method=snell", "name=t"], "method.rank:2:3", 2, "method.rank=3"),
    ],
)
def test_faults_come_before_the_first_trial(
    words: list[str], parameter: str, trials: int, fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        tuned(grid.list_points(words), parameter, trials)
    assert fake_training.started == []
    assert not list(Path().iterdir())


def test_every_configuration_gets_its_trials_on_the_first_seed() -> None:
    points = grid.list_points(GRID)
    final = tuned(points)
    trials = [folder for folder in Path("outputs/t/trials").iterdir() if (folder / "result.json").is_file()]
    assert len(trials) == len(fake_training.started) == 2 * 5
    assert {folder.name.split("-s")[1].split("-")[0] for folder in trials} == {"3"}
    assert [(p.config.method.name, p.config.seed, p.label) for p in final] == [
        (p.config.method.name, p.config.seed, p.label) for p in points
    ]
    own = {p.config.method.name: p.config.optimizer.lr for p in points}
    for point in final:
        tried = [own[point.config.method.name] * math.sqrt(10) ** i for i in (-2, -1, 0, 1, 2)]
        assert [row["value"] for row in read_tuning(point)["tried"]] == pytest.approx(tried, rel=0.005)
        assert point.folder.path.parent == Path("outputs/t")
        assert point.folder.path.name.endswith(f"s{point.config.seed}-{point.config.hash()}")


def test_the_choice_is_that_of_brute_force_over_validation() -> None:
    for point in tuned(grid.list_points(GRID)):
        about = read_tuning(point)
        best = max(about["tried"], key=lambda row: accuracy(row["value"], 4, 4))
        assert about["chosen"] == point.config.optimizer.lr == best["value"]
        assert {key: about[key] for key in ("format", "parameter", "trials")} == {
            "format": 1,
            "parameter": "optimizer.lr",
            "trials": 5,
        }
        assert [row["val"]["accuracy"] for row in about["tried"]] == [
            accuracy(row["value"], 4, 4) for row in about["tried"]
        ]
        assert {row["status"] for row in about["tried"]} == {"finished"}
        assert "test" not in json.dumps(about)


def test_test_results_change_nothing() -> None:
    first = tuned(grid.list_points(GRID))
    for number, file in enumerate(sorted(Path("outputs/t/trials").glob("*/result.json"))):
        result = json.loads(file.read_text())
        result["metrics"]["test"] = {"accuracy": 1 - number / 100, "loss": 0.0}
        file.write_text(json.dumps(result))
    again = tuned(grid.list_points(GRID))
    assert [p.config for p in again] == [p.config for p in first]
    for number, file in enumerate(sorted(Path("outputs/t/trials").glob("*/result.json"))):
        result = json.loads(file.read_text())
        del result["metrics"]["test"]
        result["metrics"]["val"]["accuracy"] = number / 100
        file.write_text(json.dumps(result))
    assert [p.config for p in tuned(grid.list_points(GRID))] != [p.config for p in first]
    assert len(fake_training.started) == 10


def test_trials_that_are_there_are_not_run_again() -> None:
    tuned(grid.list_points(GRID))
    tuned(grid.list_points(GRID))
    assert len(fake_training.started) == 10
    tuned(grid.list_points([*GRID[:1], "seed=3,4,5", *GRID[2:]]))
    assert len(fake_training.started) == 10
    tuned(grid.list_points(GRID), trials=7)
    assert len(fake_training.started) == 10 + 2 * 2


def test_failed_trials_lose_and_where_all_failed_the_own_value_stays() -> None:
    words = ["method=head", "name=t", "train.steps=4"]
    (point,) = tuned(grid.list_points([*words, "optimizer.lr=0.5"]))
    assert [row["status"] for row in read_tuning(point)["tried"]] == [
        "finished",
        "finished",
        "finished",
        "failed",
        "failed",
    ]
    assert point.config.optimizer.lr == 0.05
    (point,) = tuned(grid.list_points([*words, "optimizer.lr=50"]), trials=2)
    assert point.config.optimizer.lr == read_tuning(point)["chosen"] == 50
    assert [(row["status"], row["val"]) for row in read_tuning(point)["tried"]] == [("failed", None)] * 2


@pytest.mark.parametrize(
    ("vals", "chosen"),
    [
        ([{"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.6, "loss": 9.0}], 2),
        ([{"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "loss": 0.9}], 2),
        ([{"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "loss": 1.0}], 1),
        ([{"bits_per_byte": 2.0, "loss": 1.0}, {"bits_per_byte": 1.5, "loss": 1.0}], 2),
        ([{"accuracy": 0.1, "loss": 1.0}, None], 1),
    ],
)
def test_what_is_best(vals: list[Any], chosen: int) -> None:
    rows = [
        {"value": i, "status": "finished" if val else "failed", "val": val} for i, val in enumerate(vals, 1)
    ]
    assert tune.best(rows) == chosen


def test_another_setting_than_the_rate() -> None:
    points = grid.list_points(["method=lora", "name=t", "train.steps=4"])
    (point,) = tuned(points, "method.rank:2:32", 5)
    assert [row["value"] for row in read_tuning(point)["tried"]] == [2, 4, 8, 16, 32]
    assert point.config.method.rank == 2  # all alike: the smaller
    assert point.config.optimizer == points[0].config.optimizer


@pytest.mark.slow
def test_through_the_command_with_real_runs() -> None:
    """Two trials, two seeds; a repeated command trains nothing."""
    words = [
        "method=head",
        "seed=0,1",
        "tune=optimizer.lr:1e-5:1e-1",
        "--trials",
        "2",
        "train.steps=3",
        "train.batch_size=8",
        "name=t",
        "--json",
    ]
    command = [
        sys.executable,
        "-m",
        "finetune",
        "sweep",
        *words,
        "train.threads=1",
        "train.device=cpu",
        "dataset.retention_images=0",
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert [run["seed"] for run in runs] == [0, 1]
    trials = {
        folder: json.loads((folder / "result.json").read_text())
        for folder in Path("outputs/t/trials").iterdir()
    }
    assert len(trials) == 2
    for run in runs:
        about = json.loads((Path(run["run"]) / "tuning.json").read_text())
        vals = [result["metrics"]["val"] for result in trials.values()]
        assert sorted(row["val"]["accuracy"] for row in about["tried"]) == sorted(
            val["accuracy"] for val in vals
        )
        assert (
            about["chosen"]
            == max(about["tried"], key=lambda row: (row["val"]["accuracy"], -row["val"]["loss"]))["value"]
        )
    times = {file: file.stat().st_mtime_ns for file in Path("outputs").rglob("result.json")}
    again = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert json.loads(again.stdout) == runs
    assert {file: file.stat().st_mtime_ns for file in Path("outputs").rglob("result.json")} == times
