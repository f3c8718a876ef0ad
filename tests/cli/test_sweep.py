"""``finetune sweep`` as it is typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.sweep.grid import Point

from ..sweep.conftest import SMALL, TUNED

SEARCHED = ["--search", "optuna", "--trials", "3", "method=head", "optimizer.lr=interval(1e-3,1e-2)"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}


@pytest.mark.processes
def test_exit_codes_and_rows(typed: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = typed(*SMALL, "seed=1,2", "name=a", "--jobs", "2")
    assert code == 0, err
    assert "All files are in outputs/a" in out
    assert "[2/2]" in err
    code, out, err = typed(*SMALL, "seed=1,2,101", "name=a", "--json")
    assert code == 1
    assert [row["status"] for row in json.loads(out)] == ["finished", "finished", "failed"]
    assert "no data here" in err
    assert err.count("finished before, skipped") == 2
    told = json.loads(Path("outputs/a/sweep.json").read_text())
    assert told["overrides"][-2:] == ["seed=1,2,101", "name=a"]
    assert len(told["points"]) == 3
    code, out, err = typed("--watch", "outputs/a")
    assert (code, "2 finished, 1 failed of 3" in out) == (1, True)
    code, _, err = typed(*SMALL, "seed=101", "name=a", "--retry")
    assert "failed (no data here) after" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0,1", "train.stps=3"], "train.stps=3"),
        (["seed=range(0,600)"], "--max-runs 600"),
        (["seed=0,1,2", "--max-runs", "2"], "--max-runs 3"),
        (["seed=range(2,2)"], "the grid is empty"),
        (
            ["optimizer.lr=tag(log,interval(1e-4,1e-2))"],
            "interval(1e-4,1e-2)): only a search chooses from an interval: --search optuna --trials",
        ),
        (["seed=range(0,5"], "seed=range(0,5: a ) is missing"),
        (["seed=range(0,5))"], "seed=range(0,5)): there is a ) too many"),
        (["seed=range(5,0)"], "range(5,0,-1) counts down"),
        (["seed=range(0,5,0)"], "seed=range(0,5,0): a range takes numbers, and a step other than 0"),
        (["seed=sort(range(0,1,0.0))"], "a step other than 0"),
        (["seed=range(0,nan)"], "seed=range(0,nan): a range takes numbers"),
        (["seed=shuffle(range(0,1000000000000))"], "more than 100,000 points"),
        (["seed=0,,1"], "seed"),
        (["sweep=none_such"], "sweep=none_such is not a sweep"),
        (["--sweep", "a", "sweep=b"], "the same setting"),
        (["--name", "a", "name=b"], "the same setting"),
        (["--launcher", "ray"], "pip install 'finetune-bench[ray]'"),
        (["--launcher", "cluster"], "--launcher cluster is not a launcher"),
        (
            ["--launcher", "joblib", "--fail-fast", "--attempts", "2"],
            "--attempts 2, --fail-fast: only --launcher local supports this",
        ),
        (
            ["--launcher", "slurm", "--jobs", "3"],
            "--jobs 3 has no effect with --launcher slurm. Write launcher.array_parallelism=N",
        ),
        (["launcher.partition=x"], "local has --jobs"),
        (["--watch", "nowhere"], "there is no such folder"),
        (["--watch", "."], "no sweep was run there"),
        (["--watch", ".", "seed=1"], "takes no settings"),
        (
            ["--watch", ".", "--dry-run", "--json", "--jobs", "2", "tune=a"],
            "--jobs 2, --dry-run, --json, tune=a: --watch . only shows",
        ),
        (["--search", "optun", "--trials", "3"], "--search optun is not a search. Did you mean 'optuna'?"),
        (["--search", "optuna"], "--search optuna needs the number of trials"),
        (["--trials", "3"], "--trials 3 belongs to tune=KEY or to --search optuna"),
        (
            [*SEARCHED, "--dry-run", "--max-runs", "500", "--retry"],
            "--retry, --dry-run, --max-runs 500 cannot be combined with --search",
        ),
        (
            [*SEARCHED, "--launcher", "slurm", "launcher.qos=x", "tune=a"],
            "--launcher slurm, launcher.qos=x, tune=a cannot be combined with --search",
        ),
        (["tune=a", "tune=b"], "only one setting"),
    ],
)
def test_mistakes_exit_2_and_start_nothing(
    typed: Callable[..., tuple[int, str, str]], words: list[str], said: str
) -> None:
    code, _, err = typed(*words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not Path("outputs").exists()


@pytest.mark.slow
def test_a_search_is_ended_by_its_first_failure_and_tries_again(
    typed: Callable[..., tuple[int, str, str]],
) -> None:
    pytest.importorskip("optuna")
    words = [*SEARCHED, *SMALL[1:], "name=a"]
    code, _, err = typed(*words, "seed=104", "--attempts", "2", "--fail-fast")
    assert code == 1
    assert err.count("tried again") == 1
    assert err.count("failed (ValueError: odd) after") == 1
    assert "Stopped at the first failure" in err


@pytest.mark.processes
def test_fail_fast_and_a_full_disk_exit_1(typed: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = typed(*SMALL, "seed=101,1,2", "name=a", "--fail-fast")
    assert code == 1
    assert err.count("not finished: the same command resumes it") == 2
    code, _, err = typed(*SMALL, "seed=1,103,2", "name=b")
    assert code == 1
    assert "No space left on device. Finished runs are kept" in err
    assert Path("outputs/b").is_dir()


@pytest.mark.slow
def test_trials_of_tune_are_run_as_runs_are(typed: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = typed(*TUNED, "seed=104")
    assert (code, err.count("Error: outputs/t/trials/")) == (1, 2)
    code, out, err = typed(*TUNED, "seed=104", "--retry", "--attempts", "2")
    assert (code, err.count("tried again"), err.count("kept: see --retry")) == (1, 3, 0)
    code, out, err = typed(*TUNED, "seed=104,1", "--retry", "--fail-fast", "--json")
    assert (code, out) == (1, "[]\n")
    assert err.count("not finished: the same command resumes it") == 1
    assert "-s1-" not in err  # no run follows
    code, out, _ = typed("--watch", "outputs/t")
    assert (code, "2 failed, 2 waiting of 4" in out) == (1, True)
    typed(*TUNED, "seed=1")
    code, out, _ = typed("--watch", "outputs/t")
    assert (code, "3 finished of 3" in out) == (0, True)


@pytest.mark.processes
def test_a_launcher_takes_the_trials_of_tune_and_no_run_follows_those_it_lost(
    typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.sweep import cluster, pool

    given = list[list[str]]()

    def run_all(
        runs: list[Point], where: object, jobs: int, retry: bool, say: Callable[[str], None], options: object
    ) -> dict[Path, dict[str, object]]:
        given.append([str(point.folder.path.parent) for point in runs])
        return pool.Pool(1, say, gpus=[]).run(runs if len(given) > 1 else runs[1:])

    monkeypatch.setattr(cluster, "run_all", run_all)
    monkeypatch.setattr(cluster, "_missing", lambda name: [])
    code, _, err = typed(*TUNED, "seed=1", "--launcher", "joblib")
    assert (code, given) == (1, [["outputs/t/trials"] * 2])
    assert err.count("not finished: the same command resumes it") == 1
    code, _, err = typed(*TUNED, "seed=1", "--launcher", "joblib")
    assert (code, given[1:]) == (0, [["outputs/t/trials"] * 2, ["outputs/t"]])


@pytest.mark.slow
def test_through_the_command(tmp_path: Path) -> None:
    """Of two points one fails: exit code 1, and both in the table. The same command again starts neither."""
    words = [sys.executable, "-m", "finetune", "sweep", *SMALL, "optimizer.lr=1e-3,1e38", "name=s"]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "lr=0.001" in done.stdout
    assert "lr=1e+38" in done.stdout
    assert "Error: outputs/s/bitfit-" in done.stderr
    assert "The loss is " in done.stderr
    again = subprocess.run([*words, "--json"], env=ENV, capture_output=True, text=True, cwd=tmp_path)
    assert "finished before, skipped" in again.stderr
    assert "kept: see --retry" in again.stderr
    good, bad = json.loads(again.stdout)
    assert (good["status"], bad["status"]) == ("finished", "failed")
    assert (tmp_path / good["run"] / "predictions.parquet").is_file()


def results(folder: Path) -> dict[str, list[object]]:
    """Return the results of the runs without times and memory, with the bytes of changes and predictions."""
    found: dict[str, list[object]] = {}
    for file in sorted(folder.glob("*/result.json")):
        told = json.loads(file.read_text())
        kept = [told[key] for key in ("status", "metrics", "steps", "best_step", "config_hash")]
        found[file.parent.name] = [
            *kept,
            *(
                (file.parent / name).read_bytes()
                for name in ("delta/delta.safetensors", "predictions.parquet")
            ),
        ]
    return found


@pytest.mark.slow
def test_a_killed_sweep_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """After kill -9 of the parent and of a child, the same command ends with the same runs, to the bit."""
    steps = [word for word in SMALL if "steps" not in word]
    words = [
        sys.executable,
        "-m",
        "finetune",
        "sweep",
        *steps,
        "train.steps=30",
        "train.save_every=3",
        "seed=0,1",
        "name=s",
        "--jobs",
        "2",
    ]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for folder in (calm, rough):
        folder.mkdir()
    assert subprocess.run(words, env=ENV, cwd=calm, capture_output=True).returncode == 0
    runs = [rough / "outputs" / "s" / name for name in results(calm / "outputs" / "s")]

    def reached(run: Path, step: int) -> bool:
        return (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text()

    first = subprocess.Popen(words, env=ENV, cwd=rough, stderr=subprocess.DEVNULL)
    _until(lambda: any(reached(run, 5) for run in runs))
    pids = [json.loads((run / ".lock").read_text())["pid"] for run in runs]
    first.kill()
    first.wait()
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    second = subprocess.Popen(words, env=ENV, cwd=rough, stderr=subprocess.PIPE, text=True)
    _until(lambda: reached(runs[0], 12))
    os.kill(json.loads((runs[0] / ".lock").read_text())["pid"], signal.SIGKILL)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 1
    assert "signal 9 (SIGKILL)" in said
    third = subprocess.run(words, env=ENV, cwd=rough, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert "Resuming from step" in (runs[0] / "log.txt").read_text()
    assert results(rough / "outputs" / "s") == results(calm / "outputs" / "s")


def _until(true: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_ends_the_children_and_says_how_to_resume(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "finetune", "sweep", *SMALL, "train.steps=500", "name=s"]
    words.remove("train.steps=2")
    parent = subprocess.Popen(words, env=ENV, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    _until(lambda: bool(list(tmp_path.glob("outputs/s/*/metrics.jsonl"))))
    (lock,) = tmp_path.glob("outputs/s/*/.lock")
    pid = json.loads(lock.read_text())["pid"]
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "Interrupted by SIGINT. Finished runs are kept. To continue: finetune sweep method=bitfit" in said
    assert not Path(f"/proc/{pid}").exists()
    assert not list(tmp_path.glob("outputs/s/*/result.json"))
