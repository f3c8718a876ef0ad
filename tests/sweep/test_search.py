"""A search: what is offered, what becomes of it, and that ending it changes nothing."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.load import load
from finetune.errors import ConfigError
from finetune.sweep import search, space
from finetune.sweep.grid import Point
from finetune.sweep.status import Status
from finetune.sweep.watch import summary_line, watch
from finetune.sweep.work import Work

from . import fake_training
from .fake_training import FakePool, accuracy

optuna = pytest.importorskip("optuna")
LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
ASKED = ["method=head", LR, "train.steps=8", "name=s"]
QUICK = [
    "method=head",
    "train.batch_size=8",
    "train.threads=1",
    "train.device=cpu",
    "dataset.retention_images=0",
]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fake_training, "started", [])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.sweep.work.Pool", FakePool)


def run_search(words: list[str], trials: int) -> list[tuple[Point, dict[str, Any]]]:
    return search.run(Work(words), trials)


def read_trials(name: str = "s") -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads(Path("outputs", name, "search.json").read_text())["trials"]
    return trials


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["method=lora", "seed=0,1"], "would choose a lucky seed"),
        (["method=lora"], "Nothing is to be searched"),
        (["method=lora", "optimizer.lr=interval(1e-2,1e-4)"], "is empty"),
        (["method=lora", "optimizer.lr=tag(log,interval(0,1))"], "needs a first value above 0"),
        (["method=lora", "method.rank=choice(2,0)"], "method.rank=0"),
        (["method=lora", "method.rank=interval(2,4.5)"], "method.rank=4.5"),
        (["method=lora", "optimizer.lr=interval(-1,1)"], "optimizer.lr=-1"),
        (["method=lora", "optimizer.lrr=interval(1,2)"], "optimizer.lrr"),
        (["method=lora,snell", "method.rnk=interval(2,4)"], "method.rnk"),
        (["method=lora,snel", "optimizer.lr=interval(1,2)"], "method=snel"),
    ],
)
def test_faults_come_before_the_first_trial(words: list[str], fault: str, fake: None) -> None:
    with pytest.raises(ConfigError, match=fault):
        run_search(words, 3)
    assert not list(Path().iterdir())


def test_the_best_is_found_and_comes_first(fake: None) -> None:
    results = run_search(ASKED, 20)
    finished = [(point, result) for point, result in results if result["status"] == "finished"]
    best, result = finished[0]
    assert result["metrics"]["val"]["accuracy"] == max(accuracy(lr, 8, 8) for _, lr in fake_training.started)
    assert 0.001 < best.config.optimizer.lr < 0.01
    assert best.label == f"optimizer.lr={best.config.optimizer.lr!r}"
    assert json.loads(Path("outputs/s/search.json").read_text())["best"] == next(
        t["number"] for t in read_trials() if t["run"] == best.folder.path.name
    )
    shown = [r["metrics"]["val"]["accuracy"] for _, r in finished]
    assert shown == sorted(shown, reverse=True)
    assert [r["status"] for _, r in results[len(finished) :]] == ["pruned"] * (20 - len(finished))
    assert all(1e-4 <= lr <= 1e-1 for _, lr in fake_training.started)


def test_pruned_by_the_median_of_earlier_trials(fake: None) -> None:
    """The oracle is the rule: once five trials have finished, what is worse than their median is pruned."""
    run_search(ASKED, 16)
    reached: dict[int, list[float]] = {step: [] for step in (2, 4, 6, 8)}
    finished = 0
    for trial in read_trials():
        lr = trial["settings"]["optimizer.lr"]
        for step in (2, 4, 6, 8):
            others = sorted(reached[step])
            middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2 if others else 0.0
            best = max(accuracy(lr, s, 8) for s in range(2, step + 1, 2))
            if step < 8 and finished >= 5 and best < middle:
                assert (trial["status"], trial["steps"]) == ("pruned", step)
                assert f"pruned at step {step}" in trial["error"]
                assert not Path("outputs/s", trial["run"], "result.json").exists()
                break
        else:
            assert trial["status"] == "finished"
            finished += 1
            for step, values in reached.items():
                values.append(accuracy(lr, step, 8))
    assert 5 <= finished < 16


def test_others_can_watch_it(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    train, seen = FakePool.train, list[tuple[bool, int, int]]()

    def watched(self: FakePool, *args: Any) -> dict[str, Any]:
        status = Status(Path("outputs/s"))
        states = status.states()
        seen.append((status.alive, sum(state.run != "" for state in states), len(states)))
        return train(self, *args)

    monkeypatch.setattr(FakePool, "train", watched)
    run_search(ASKED, 16)
    assert seen == [(True, number, 16) for number in range(1, 17)]
    status = Status(Path("outputs/s"))
    states = [state.state for state in status.states()]
    assert sorted(states) == sorted(trial["status"] for trial in read_trials())
    assert "pruned" in states
    assert f"{states.count('pruned')} pruned of 16" in summary_line(status, status.states())
    assert watch(Path("outputs/s")) == 0


def test_a_run_that_is_done_is_not_pruned() -> None:
    """By a pruner that always would."""
    own = SimpleNamespace(report=lambda value, step: None, should_prune=lambda: True)
    for step, pruned in ((6, True), (8, False)):
        trial: Any = SimpleNamespace(
            own=own,
            point=SimpleNamespace(config=load(ASKED[:1] + ASKED[2:])),
            pruned="",
            reported=0,
            judged=True,
        )
        search.Search._judge(object(), trial, {"step": step, "val_accuracy": 0.5})  # type: ignore[arg-type]
        assert bool(trial.pruned) is pruned


def test_the_same_seed_gives_the_same_trials_and_another_others(fake: None) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_search([*ASKED[:-1], f"name={name}", f"seed={seed}"], 6)
    a, b, c = ([t["settings"] for t in read_trials(name)] for name in "abc")
    assert a == b
    assert a != c


def test_more_trials_continue_a_search(fake: None) -> None:
    run_search(ASKED, 9)
    whole = read_trials()
    assert len(fake_training.started) == 9
    for trials in (4, 4, 9):
        run_search([*ASKED[:-1], "name=parts"], trials)
    assert len(fake_training.started) == 18
    assert [(t["settings"], t["status"], t["steps"]) for t in read_trials("parts")] == [
        (t["settings"], t["status"], t["steps"]) for t in whole
    ]
    assert run_search(ASKED, 3)
    assert len(fake_training.started) == 18


def test_failures_are_trials(fake: None) -> None:
    run_search(["method=head", "optimizer.lr=choice(0.01,5)", "train.steps=4", "name=s"], 8)
    states = {t["settings"]["optimizer.lr"]: (t["status"], t["error"]) for t in read_trials()}
    assert states == {"0.01": ("finished", None), "5": ("failed", "the loss is nan")}
    assert len(read_trials()) == 8
    assert len(fake_training.started) == 2


def test_contradictions_between_settings_fail_alone(fake: None) -> None:
    words = ["method=hft", "method.rounds=choice(1,2)", "sparsity=choice(0.5,0.0)", "train.steps=4", "name=s"]
    run_search(words, 12)
    failed = [t for t in read_trials() if t["status"] == "failed"]
    assert failed
    assert all(t["settings"] == {"method.rounds": "2", "method.sparsity": "0.0"} for t in failed)
    assert all("draws nothing" in t["error"] and t["run"] is None for t in failed)


def test_settings_that_a_method_lacks_are_left_out_for_it(fake: None) -> None:
    results = run_search(["method=head,shira", "sparsity=choice(0.5,0.9)", "train.steps=2", "name=s"], 10)
    assert {point.label for point, _ in results} == {
        "method=head",
        "method=shira method.sparsity=0.5",
        "method=shira method.sparsity=0.9",
    }


def test_another_search_in_the_folder_is_refused(fake: None) -> None:
    run_search(ASKED, 1)
    with pytest.raises(ConfigError, match=r"outputs/s holds another search: .*tag\(log"):
        run_search(["method=head", "optimizer.lr=interval(1e-3,1e-2)", "train.steps=8", "name=s"], 1)
    assert len(read_trials()) == 1


def test_a_damaged_storage_is_said(fake: None) -> None:
    Path("outputs/s").mkdir(parents=True)
    Path("outputs/s/search.db").write_text("this is not a database" * 100)
    with pytest.raises(ConfigError, match=r"outputs/s/search.db cannot be read"):
        run_search(ASKED, 1)


def test_one_search_at_a_time(fake: None) -> None:
    run_search(ASKED, 1)
    with Path("outputs/s/.search.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="outputs/s is being searched by another process"):
            run_search(ASKED, 2)
    assert len(run_search(ASKED, 2)) == 2


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'finetune-bench\[search\]'"):
        run_search(ASKED, 1)


@pytest.mark.slow
def test_killed_at_any_time_it_ends_with_the_same_trials(fake: None) -> None:
    """A search in a process of its own, killed with -9 again and again, against one that was left alone."""
    run_search([*ASKED[:-1], "name=whole"], 9)
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import finetune.sweep.work
        from finetune.sweep import search
        from finetune.sweep.work import Work
        from tests.sweep import fake_training
        fake_training.FakePool.pause = 0.02
        finetune.sweep.work.Pool = fake_training.FakePool
        search.run(Work({ASKED!r}), 9)
    """
    kills = 0
    for wait in (0.1, 0.4, 60):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=ENV)
        begun, end = search_rows(), time.monotonic() + 60
        while process.poll() is None and search_rows() <= begun and time.monotonic() < end:
            time.sleep(0.005)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -9
    assert kills >= 2
    assert process.returncode == 0
    kept = ("number", "settings", "status", "val", "steps", "error")
    assert [{key: t[key] for key in kept} for t in read_trials()] == [
        {key: t[key] for key in kept} for t in read_trials("whole")
    ]


def search_rows() -> int:
    """How many trials ``search.json`` holds by now."""
    try:
        return len(read_trials())
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_pruning_stops_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    """A real run of many steps beside five trials that were perfect from the start."""
    words = [*QUICK, LR, "train.steps=5000", "train.eval_every=5", "name=s"]
    one = search.Search([w for w in words if w != LR], space.space(words, None)[1], None, None)
    with one.exclusive(Path("outputs/s")):
        one.open_study(words, 0, False, 6)
        for lr in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3):
            distribution = {"optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)}
            perfect = {5: 1.0, 10: 1.0}
            made = optuna.trial.create_trial(
                value=1.0,
                params={"optimizer.lr": lr},
                distributions=distribution,
                intermediate_values=perfect,
            )
            one.study.add_trial(made)
    results = run_search(words, 6)
    said = capsys.readouterr().err
    *_, trial = read_trials()
    assert (trial["status"], trial["steps"]) == ("pruned", 5)
    run = Path("outputs/s", trial["run"])
    assert not (run / "result.json").exists()
    assert 5 <= json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 5000
    assert "stopped (pruned at step 5" in said
    with (run / ".lock").open() as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no process holds the lock any more
    assert [result["status"] for point, result in results if point.folder.path.name == run.name] == ["pruned"]


@pytest.mark.slow
def test_through_the_command_with_real_runs() -> None:
    """Killed after its first trial and repeated, against one that was left alone."""
    words = ["--search", "optuna", "--trials", "3", *QUICK, LR, "train.steps=3", "train.eval_every=1"]
    command = [sys.executable, "-m", "finetune", "sweep"]
    whole = subprocess.run(
        [*command, *words, "name=whole", "--json"], env=ENV, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    assert len(json.loads(whole.stdout)) == 3
    process = subprocess.Popen(
        [*command, *words, "name=s"], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while search_rows() < 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    again = subprocess.run([*command, *words, "name=s"], env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [(t["settings"], t["val"]) for t in read_trials()] == [
        (t["settings"], t["val"]) for t in read_trials("whole")
    ]
