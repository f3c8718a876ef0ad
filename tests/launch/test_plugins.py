"""Plug-ins in the processes that a command starts.

These are ranks, runs of sweeps, measurements, jobs of launchers, repetitions.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.nursery import Nursery, nursery
from ..support.plugin import write_plugin

pytestmark = pytest.mark.processes
SHORT = [
    "train.steps=2",
    "train.batch_size=8",
    "train.eval_every=null",
    "train.device=cpu",
    "train.threads=1",
    "dataset.retention_images=0",
]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("said")) as made:
        yield made


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plugin(tmp_path_factory.mktemp("plug-ins") / "mine")


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("outputs/*/*/result.json"))]


def test_ranks_load_it(commands: Nursery, mine: Path, tmp_path: Path) -> None:
    words = ["train", "--plugins", str(mine), "--processes", "2", "--json", "method=scratch_rows", *SHORT]
    child = commands.run(*words, "name=n", "run=r", folder=tmp_path)
    assert child.wait() == 0, child.said
    result = json.loads(child.out)
    assert (result["processes"], result["method"]) == (2, "scratch_rows")
    assert [record["name"] for record in result["plugins"]] == ["mine"]


def test_a_stopped_run_resumes_by_the_command_that_it_prints(
    commands: Nursery, mine: Path, tmp_path: Path
) -> None:
    long = ["train.steps=2000", *SHORT[1:]]
    child = commands.start(
        "train", "--plugins", str(mine), "method=scratch_rows", *long, "name=n", "run=r", folder=tmp_path
    )
    run = tmp_path / "outputs/n/r"
    assert child.until(lambda: (run / "metrics.jsonl").exists()), child.said
    child.kill(signal.SIGTERM)
    assert child.wait() == 130, child.said
    printed = child.said.partition("To continue: finetune ")[2].strip()
    assert shlex.split(printed) == ["train", "--resume", "outputs/n/r", "--plugins", str(mine)]
    more = commands.start(*shlex.split(printed), folder=tmp_path)
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert more.until(lambda: len((run / "metrics.jsonl").read_text().splitlines()) > steps + 1), more.said
    more.kill(signal.SIGTERM)
    assert more.wait() == 130
    without = commands.run("train", "--resume", "outputs/n/r", folder=tmp_path)
    assert without.wait() == 2
    assert "was made with the plug-in mine 1.2 (SHA-256 " in without.said


def test_forked_runs_of_a_sweep_load_it(commands: Nursery, mine: Path, tmp_path: Path) -> None:
    words = [
        "sweep",
        "--plugins",
        str(mine),
        "method=scratch_rows,head",
        "optimizer=scratch_sgd",
        *SHORT,
        "name=s",
    ]
    child = commands.run(*words, folder=tmp_path)
    assert child.wait() == 0, child.said
    assert sorted(str(found["method"]) for found in results(tmp_path)) == ["head", "scratch_rows"]
    assert all(found["plugins"] for found in results(tmp_path))


def test_trials_of_a_tuned_sweep_and_a_dry_run_load_it(commands: Nursery, mine: Path, tmp_path: Path) -> None:
    words = ["sweep", "--plugins", str(mine), "method=scratch_rows", *SHORT, "train.eval_every=1", "name=t"]
    words.remove("train.eval_every=null")
    dry = commands.run(*words, "--dry-run", "--json", folder=tmp_path)
    assert dry.wait() == 0, dry.said
    assert len(json.loads(dry.out)["runs"]) == 1
    assert not results(tmp_path)
    child = commands.run(*words, "tune=optimizer.lr", "--trials", "2", folder=tmp_path)
    assert child.wait() == 0, child.said
    assert [found["method"] for found in results(tmp_path)] == ["scratch_rows"]


def test_a_search_loads_it(commands: Nursery, mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = [
        "sweep",
        "--plugins",
        str(mine),
        "--search",
        "optuna",
        "--trials",
        "2",
        "method=scratch_rows",
        *SHORT,
    ]
    words[words.index("train.eval_every=null")] = "train.eval_every=1"
    child = commands.run(*words, "optimizer.lr=interval(0.001,0.1)", "name=o", folder=tmp_path)
    assert child.wait() == 0, child.said


def test_jobs_of_a_launcher_load_it(commands: Nursery, mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [
        "sweep",
        "--plugins",
        str(mine),
        "--launcher",
        "joblib",
        "--jobs",
        "1",
        "method=scratch_rows",
        *SHORT,
    ]
    child = commands.run(*words, "name=j", folder=tmp_path)
    assert child.wait() == 0, child.said
    assert [found["method"] for found in results(tmp_path)] == ["scratch_rows"]


def test_verify_and_reproduce_load_it(commands: Nursery, mine: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "--plugins",
        str(mine),
        "method=scratch_rows",
        *SHORT,
        "train.save_every=1",
        "name=n",
        "run=r",
    ]
    assert commands.run(*words, folder=tmp_path).wait() == 0
    for command in (["verify", "outputs/n/r"], ["reproduce", "outputs/n/r"], ["inspect", "outputs/n/r"]):
        child = commands.run(command[0], "--plugins", str(mine), *command[1:], folder=tmp_path)
        assert child.wait() == 0, child.said
        assert commands.run(*command, folder=tmp_path).wait() == 2


def test_accelerate_launch_hands_the_option_on(mine: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    words += [
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={port}",
    ]
    words += ["-m", "finetune"]
    words += ["train", "--plugins", str(mine), "--json", "method=scratch_rows", *SHORT, "name=n", "run=r"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = results(tmp_path)
    assert (found["method"], found["processes"]) == ("scratch_rows", 2)
