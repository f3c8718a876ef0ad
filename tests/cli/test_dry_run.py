"""``finetune sweep --dry-run``: time, memory, and what is there already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.sweep import forecast
from finetune.sweep.measure import Measurement

from ..sweep.conftest import SMALL, TUNED

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}


def test_a_dry_run_shows_time_and_memory_and_writes_nothing(
    typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def measure(config: object, options: object) -> Measurement:
        asked.append(config.method.name)  # type: ignore[attr-defined]
        return Measurement(step=0.5, evaluation=3.0, fixed=10.0, memory_bytes=2**30)

    monkeypatch.setattr(forecast, "measure", measure)
    monkeypatch.setattr(forecast, "room_for_one", lambda jobs: 3 * 2**29)
    words = [
        "method=bitfit,head",
        "seed=0,1",
        "train.steps=100",
        "train.eval_every=30",
        "name=d",
        "--dry-run",
    ]
    _, out, _ = typed(*words, "--json", "--jobs", "2")
    told = json.loads(out)
    assert asked == ["bitfit", "head"]  # one measurement of each kind
    assert [run["seconds"] for run in told["runs"]] == [
        10 + 50 + 4 * 3
    ] * 4  # validations after 30, 60, 90 and 100 steps
    assert told["total"] == {
        "runs": 4,
        "finished": 0,
        "to_run": 4,
        "seconds": 144.0,
        "peak_memory_bytes": 2**30,
        "room_bytes": 3 * 2**29,
        "cannot_fit": 0,
    }
    assert not Path("outputs").exists()
    monkeypatch.setattr(forecast, "room_for_one", lambda jobs: 2**29)
    _, out, _ = typed(*words)
    assert "1.0 GiB, does not fit" in out
    assert "72 s" in out
    assert "seconds: 5 min" in out  # four, one after the other


@pytest.mark.processes
def test_a_dry_run_knows_what_is_there(
    typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "measure", lambda config, options: Measurement(fault="no way"))
    typed(*SMALL, "seed=1,101", "name=d")
    _, out, err = typed(*SMALL, "seed=1,101,2", "name=d", "--dry-run", "--json")
    rows = json.loads(out)["runs"]
    assert [row["would"] for row in rows] == ["be skipped: finished", "be kept: failed", "start"]
    _, out, _ = typed(*SMALL, "seed=1,101,2", "name=d", "--dry-run", "--json", "--retry")
    assert json.loads(out)["runs"][1]["would"] == "start"
    file = next(Path("outputs/d").glob("*-s1-*/result.json"))
    from finetune.config.load import load
    from finetune.storage.result import group_hash

    known = json.loads(file.read_text()) | {
        "group_hash": group_hash(load([], config_file=file.with_name("config.yaml")))
    }
    file.write_text(json.dumps(known))
    lock = file.with_name(".lock")
    lock.write_text(json.dumps({"started": file.stat().st_mtime - 40}))
    _, out, _ = typed(*SMALL, "seed=1,2", "name=d", "--dry-run", "--json")
    row = json.loads(out)["runs"][1]
    assert (round(row["seconds"]), row["memory_bytes"], row["fits"]) == (40, 10**8, True)
    words = [word.replace("batch_size=8", "batch_size=4") for word in SMALL]
    _, out, err = typed(*words, "seed=3", "name=d", "--dry-run")
    assert "could not be measured: no way" in err


@pytest.mark.processes
def test_a_dry_run_counts_the_trials_of_tune_and_knows_what_they_chose(
    typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        forecast,
        "measure",
        lambda config, options: Measurement(step=1.0, memory_bytes=1),
    )
    typed(*SMALL, "seed=1", "name=t")  # with its own value, which tells nothing of the tuned run
    _, out, err = typed(*TUNED, "seed=1,2", "--dry-run", "--json")
    told = json.loads(out)
    assert [row["would"] for row in told["runs"]] == [
        "start",
        "start",
        "follow its trials",
        "follow its trials",
    ]
    assert [row["run"] is None for row in told["runs"]] == [False, False, True, True]
    total = {
        key: told["total"][key]
        for key in ("runs", "finished", "to_run", "seconds", "trials", "trials_to_run")
    }
    assert total == {"runs": 4, "finished": 0, "to_run": 4, "seconds": 8.0, "trials": 2, "trials_to_run": 2}
    _, out, err = typed(*TUNED, "seed=1,2", "--dry-run")
    assert "that their trials will choose" in err
    typed(*TUNED, "seed=1")
    _, out, err = typed(*TUNED, "seed=1,2", "--dry-run", "--json")
    told = json.loads(out)
    assert [row["would"] for row in told["runs"]] == [*["be skipped: finished"] * 3, "start"]
    assert (told["total"]["to_run"], told["total"]["trials_to_run"]) == (1, 0)
    assert "that their trials will choose" not in err


@pytest.mark.slow
def test_a_real_measurement(tmp_path: Path) -> None:
    """Four steps of the built-in task, and a run that cannot be measured."""
    words = [
        sys.executable,
        "-m",
        "finetune",
        "sweep",
        *SMALL,
        "train.precision=fp32,fp16",
        "name=s",
        "--dry-run",
        "--json",
    ]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, cwd=tmp_path)
    good, bad = json.loads(done.stdout)["runs"]
    assert good["fits"] is True
    assert 10**8 < good["memory_bytes"] < 10**10
    assert 1 < good["seconds"] < 600
    assert "needs a GPU" in bad["fault"]
    assert not list(tmp_path.iterdir())
