"""Sweeps: which runs, where, in which order, and what becomes of those that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import sweep
from finetune.errors import ConfigError
from finetune.train.result import make_result

SMALL = ["method=head", "train.steps=2", "train.eval_every=null", "train.batch_size=8", "train.threads=1"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_points_are_the_cross_product() -> None:
    runs = sweep.points(["method=lora,snell", "seed=0,1", "train.steps=3"])
    assert [(p.config.method.name, p.config.seed, p.config.train.steps) for p in runs] == [(m, s, 3) for m in ("lora", "snell") for s in (0, 1)]
    assert [p.label for p in runs] == ["method=lora", "method=lora", "method=snell", "method=snell"]
    assert not list(Path().iterdir())


def test_folders_are_named_by_content() -> None:
    first, again, other = (sweep.points(o) for o in (["seed=0,1", "method=head"], ["method=head", "seed=0,1"], ["seed=0,1,2", "method=head"]))
    assert [p.folder for p in first] == [p.folder for p in again]
    assert first[0].folder.path.parent != other[0].folder.path.parent
    assert first[0].folder.path.name == other[0].folder.path.name
    for point in first:
        assert point.folder.path == Path("outputs", point.config.name or "", point.config.run or "")
        assert point.config.hash() in point.folder.path.name
    assert sweep.points(["seed=0,1", "name=mine"])[0].folder.path.parent == Path("outputs/mine")


def test_points_of_the_same_content_are_one() -> None:
    assert [p.config.seed for p in sweep.points(["seed=0,1,0"])] == [0, 1]


def test_on_top_of_a_frozen_config() -> None:
    (point,) = sweep.points(["seed=5", "name=a"])
    sweep.freeze([point])
    runs = sweep.points(["train.steps=3,4"], config_file=point.folder.config)
    assert [(p.config.seed, p.config.train.steps) for p in runs] == [(5, 3), (5, 4)]
    assert len({p.folder.path for p in [point, *runs]}) == 3


def test_all_faults_of_all_points_before_any_starts() -> None:
    with pytest.raises(ConfigError) as caught:
        sweep.points(["method=lora,snell", "sparsity=0.1", "seed=0,1", "train.stps=3"])
    everywhere, lora = sorted(caught.value.faults, key=lambda fault: "sparsity" in fault)
    assert "train.stps=3" in everywhere
    assert "(at " not in everywhere
    assert "method=lora" in lora
    assert lora.endswith("(at method=lora seed=0 and 1 more)")
    assert not list(Path().iterdir())


def test_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="run=x: a sweep names its runs by their content"):
        sweep.points(["run=x", "seed=0,1"])


def test_another_run_in_the_way_stops_the_sweep(fake: list[str]) -> None:
    runs = sweep.points(["seed=0,1"])
    runs[1].folder.open_or_check(runs[0].config)
    with pytest.raises(ConfigError, match="holds another run"):
        sweep.run_all(runs, print)
    assert fake == []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Children that finish at once; seed 1 fails, seed 2 is killed. Returns the frozen files they were given."""
    started: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:-1] == [sys.executable, "-m", "finetune", "train", "--json", "--config"]
        started.append(command[-1])
        point = next(p for p in sweep.points(["seed=0,1,2"]) if str(p.folder.config) == command[-1])
        if point.config.seed:
            return subprocess.CompletedProcess(command, {1: 2, 2: -9}[point.config.seed], "", "a warning\nError: no data here\n")
        point.folder.result.write_text(json.dumps(make_result(point.config, status="finished", steps=7)))
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE))
    return started


def test_failures_are_results_and_finished_runs_are_skipped(fake: list[str]) -> None:
    runs, said = sweep.points(["seed=0,1,2"]), list[str]()
    results = sweep.run_all(runs, said.append)
    assert [r["status"] for r in results] == ["finished", "failed", "failed"]
    assert [r["error"] for r in results] == [None, "no data here", "the process was ended by signal 9"]
    assert [p.folder.read_result() for p in runs] == results
    assert len(fake) == 3
    assert any("failed (no data here)" in line for line in said)
    assert [row["would"] for row in sweep.outlook(runs)] == ["be skipped: finished", "start", "start"]
    sweep.run_all(runs, said.append)
    assert fake[3:] == [str(p.folder.config) for p in runs[1:]]


def test_through_the_command() -> None:
    """One point works and one cannot: exit 1, both in the table; the same again starts only the one that failed."""
    words = [sys.executable, "-m", "finetune", "sweep", *SMALL, "train.device=cpu", "train.precision=fp32,fp16", "name=s"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    dry = subprocess.run([*words, "--dry-run", "--json"], env=env, capture_output=True, text=True)
    assert [run["would"] for run in json.loads(dry.stdout)["runs"]] == ["start", "start"]
    assert not list(Path().iterdir())
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "train.precision=fp32" in done.stdout
    assert "train.precision=fp16" in done.stdout
    assert "Error: outputs/s/head-" in done.stderr
    assert "needs a GPU" in done.stderr
    again = subprocess.run([*words, "--json"], env=env, capture_output=True, text=True)
    assert "finished before, skipped" in again.stderr
    good, bad = json.loads(again.stdout)
    assert (good["status"], bad["status"]) == ("finished", "failed")
    assert Path(good["run"], "predictions.parquet").is_file()
