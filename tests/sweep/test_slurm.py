"""A real Slurm: runs are jobs, and a job that is killed and queued again ends with a finished run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

START = Path(__file__).resolve().parents[3] / "shared" / "tools" / "slurm_local.sh"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TINY = ["method=bitfit", "train.eval_every=null", "train.batch_size=8", "train.threads=1", "train.device=cpu"]
ASK = ["--launcher", "slurm", "launcher.timeout_min=5", "launcher.cpus_per_task=1", "launcher.mem_gb=2"]
pytestmark = pytest.mark.slurm


def answers() -> bool:
    return (
        shutil.which("sinfo") is not None
        and subprocess.run(["sinfo", "-h"], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="module", autouse=True)
def slurm() -> None:
    if not answers():
        if not START.exists() or os.geteuid():
            pytest.skip("no Slurm answers, and there is none to start")
        subprocess.run([str(START), "start"], check=True, capture_output=True)
    assert answers()


def sweep(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune", "sweep", *TINY, *words, *ASK]
    return subprocess.Popen(
        command, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _until(true: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def steps(folder: Path) -> int:
    return max(
        (len(file.read_text().splitlines()) for file in folder.glob("outputs/q/*/metrics.jsonl")), default=0
    )


def job_of(folder: Path) -> str:
    (file,) = folder.glob("outputs/q/.launcher/*/.submitit/*/*_submission.sh")
    return file.name.split("_")[0]


def test_runs_are_jobs(tmp_path: Path) -> None:
    done = sweep(tmp_path, "train.steps=2", "seed=0,1", "name=q", "--json")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert [row["status"] for row in json.loads(out)] == ["finished", "finished"]
    assert len(list(tmp_path.glob("outputs/q/.launcher/*/.submitit/*/*result.pkl"))) == 2


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_job_that_is_killed_and_requeued_resumes_from_its_checkpoint(tmp_path: Path, how: str) -> None:
    """The job ends by Slurm's signal before a time limit, or by kill -9 and ``scontrol requeue``."""
    going = sweep(tmp_path, "train.steps=60", "train.save_every=5", "name=q", "--json")
    _until(lambda: steps(tmp_path) >= 8)
    number = job_of(tmp_path)
    if how == "signal":
        subprocess.run(["scancel", "--signal=USR2", number], check=True)
    else:
        (lock,) = tmp_path.glob("outputs/q/*/.lock")
        child = json.loads(lock.read_text())["pid"]
        os.kill(int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1]), 9)
        _until(lambda: not Path(f"/proc/{child}").exists())
        _until(lambda: "COMPLETING" not in _state(number))
        subprocess.run(["scontrol", "requeue", number], check=True)
    _until(lambda: "Restarts=1" in _state(number))
    assert not list(tmp_path.glob("outputs/q/*/result.json"))
    _until(lambda: _now(number) or "JobState=RUNNING" in _state(number))
    out, err = going.communicate(timeout=400)
    assert going.returncode == 0, err
    (row,) = json.loads(out)
    assert (row["status"], row["steps"]) == ("finished", 60)
    (log,) = tmp_path.glob("outputs/q/*/log.txt")
    assert "Resuming from step" in log.read_text()


def _state(number: str) -> str:
    return subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout


def _now(number: str) -> bool:
    """Have a job that was queued again start without Slurm's delay of two minutes."""
    return (
        subprocess.run(
            ["scontrol", "update", f"JobId={number}", "StartTime=now"], capture_output=True
        ).returncode
        == 0
    )
