"""Check that a resumed run ends with the same bits as an uninterrupted one, which is the oracle."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from finetune import registry
from finetune.config.load import load
from finetune.config.settings import Config
from finetune.core.method import Run
from finetune.core.selector import Selector
from finetune.errors import ConfigError
from finetune.launch import resume
from finetune.methods.reparam.lora import LoRA
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.methods.sparse.sparse import Crossing
from finetune.optim.sm3 import SM3
from finetune.selectors.ist import IST
from finetune.storage import checkpoint, lock
from finetune.storage.delta import read_description
from finetune.storage.progress import ProgressRecord
from finetune.system.signals import Interrupted, Signals
from finetune.testing import contract, sessions
from finetune.testing.cases import find_cases
from finetune.training import checkpoints, run, selection
from finetune.training.evaluate import Evaluation
from finetune.training.prepare import Setup

from ..support import task
from ..support.same_run import differences

STEPS = 6
SMALL = [f"train.steps={STEPS}", "train.eval_every=2"]
CASES = find_cases(Path(__file__).parents[1] / "methods")
OFTEN = ("lt_sft", "spiel")  # the contract, which is quicker, looks at every method every time


def some(names: Iterable[str], quick: Sequence[str]) -> list[Any]:
    """All of them, slow but for the quick ones."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


# Sessions: what the contract checks of every method, under more schedules, selectors, precisions and loaders.


@dataclass(frozen=True)
class Drawing(LoRA):
    """Draws from every generator there is in every step, and lets the draws decide."""

    name: ClassVar[str] = "drawing"

    def after_step(self, run: Run, state: Any) -> None:
        drawn = (
            random.gauss(0, 1)
            + np.random.standard_normal()
            + float(torch.randn(()))
            + float(torch.randn((), generator=run.generator))
        )
        run.log(drawn=drawn)
        with torch.no_grad():
            next(state.parameters()).add_(1e-3 * drawn)


def test_every_generator_continues_where_it_stopped() -> None:
    contract.check_resume(contract.Trial(lambda: Drawing(rank=2)))


SCHEDULES = {
    "static": {},
    "redraw": {"every": 2},
    "drop_grow": {"every": 2},
    "one_shot": {"dense": 0.4},
    "grow": {"every": 1},
    "narrow": {"at": 0.5},
    "cubic": {"initial": 2.0, "every": 1, "end": 1.0},
    "linear": {"initial": 0.5, "power": 1.0, "every": 1, "end": 1.0},
}


def _schedule(name: str) -> Any:
    known = registry.catalog("schedule")
    return registry.get("schedule", name if name in known else "ramp")(**SCHEDULES[name])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str) -> None:
    make = lambda: Crossing(sparsity=0.8, score="snip", schedule=_schedule(schedule))  # noqa: E731
    contract.check_resume(contract.Trial(make))


@pytest.mark.parametrize(
    "method", [lambda: LoRA(rank=2), lambda: Crossing(sparsity=0.9)], ids=["lora", "sparse"]
)
@pytest.mark.parametrize(
    "selector", [lambda: IST(every=2, probes=2), lambda: IST(probes=0)], ids=["ist", "rst"]
)
def test_selectors(method: contract.Make, selector: Callable[[], Selector]) -> None:
    contract.check_resume(contract.Trial(method, choose=selector))


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 3},
        {"precision": "bf16"},
        {"clip": None},
        pytest.param({"workers": 2}, marks=pytest.mark.processes),
    ],
    ids=lambda change: next(iter(change)),
)
def test_micro_batches_precisions_and_workers(change: dict[str, Any]) -> None:
    train = replace(contract.TRAIN, **change)
    contract.check_resume(contract.Trial(lambda: LTSFT(sparsity=0.9), train=train))
    contract.check_resume(contract.Trial(lambda: LoRA(rank=2, dropout=0.3), "gpt2", train))


def test_another_optimizer_and_schedule_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "OPTIMIZER", SM3(lr=0.05, weight_decay=0.1, schedule="linear", warmup=0.5))
    for make in (lambda: Crossing(sparsity=0.9, schedule=_schedule("drop_grow")), lambda: LoRA(rank=2)):
        contract.check_resume(contract.Trial(make))


# Runs: all their files, ended by real signals and by exceptions at bad moments.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of a small task."""
    return task.make(tmp_path_factory.mktemp("task"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(place: list[str], *more: str) -> Config:
    return load(list({text.partition("=")[0]: text for text in (*place, *SMALL, *more)}.values()))


def go(settings: Config, folder: Path, stops: tuple[int, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """Train to the end, restarted after each of ``stops``; return the result and the last messages."""
    for stop in stops:
        assert interrupt(settings, folder, stop).name == "SIGTERM"
        assert not (folder / "result.json").exists()
    said: list[str] = []
    return run.train(settings, folder, said.append, lambda done, total, words: None), said


def interrupt(settings: Config, folder: Path, stop: int | None = None) -> Interrupted:
    """Train until a SIGTERM, which comes while the step after ``stop`` is made, or from elsewhere."""

    def progress(done: int, total: int, words: str) -> None:
        if done == stop:
            signal.raise_signal(signal.SIGTERM)

    with Signals() as signals, pytest.raises(Interrupted) as stopped:
        run.train(settings, folder, lambda line: None, progress, signals)
    return stopped.value


def kill(settings: Config, folder: Path, patch: Callable[[pytest.MonkeyPatch], None]) -> None:
    """Train with ``patch``, of which the run dies."""
    with pytest.MonkeyPatch.context() as context:
        patch(context)
        with pytest.raises(Killed):
            go(settings, folder)


@pytest.mark.parametrize("method", some(registry.catalog("method"), OFTEN))
def test_every_method_ends_the_same_whenever_it_was_stopped(
    place: list[str], here: Path, method: str
) -> None:
    short = next(case.settings for case in CASES if case.method == method)
    settings = config(place, f"method={method}", *short, "train.save_every=6")
    go(settings, here / "whole")
    go(settings, here / "again", (2, 4) if method in OFTEN else (0, 1, 2, 4, 6))
    assert differences(here / "whole", here / "again") == []
    assert sorted(file.name for file in (here / "again" / "checkpoints").iterdir())[-1] == "step-6"


SETTINGS = [
    "train.select=last",
    "train.precision=bf16",
    "train.workers=2",
    "train.micro_batch_size=3",
    "selector=ist selector.every=2",
]


@pytest.mark.parametrize("settings", some(SETTINGS, SETTINGS[:1]))
def test_settings_that_have_a_state_of_their_own(place: list[str], here: Path, settings: str) -> None:
    made = config(
        place, "method=spiel", "schedule.every=2", "method.window=1", *settings.split(), "train.save_every=3"
    )
    go(made, here / "whole")
    go(made, here / "again", (1, 3))
    assert differences(here / "whole", here / "again") == []


class Killed(BaseException):
    """An exception that the program handles nowhere."""


def after(owner: Any, name: str, n: int = 1) -> Callable[[pytest.MonkeyPatch], None]:
    """Dies when ``name`` has been called for the n-th time."""

    def make(patch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(owner, name), []

        def call(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            calls.append(name)
            if len(calls) == n:
                raise Killed
            return found

        patch.setattr(owner, name, call)

    return make


BREAKS = {
    "a better change stored, the checkpoint not": [after(selection, "save_delta", 2)],
    "half a checkpoint written": [after(checkpoint, "save_file", 2), after(checkpoint, "save_file")],
    "a checkpoint renamed, the old ones not removed": [
        after(checkpoint, "save", 2),
        after(checkpoint, "save"),
    ],
    "validated and not logged": [
        after(run, "keep_if_best", 3),
        after(run, "keep_if_best", 2),
    ],
    "predictions written, no result": [after(run, "write_predictions")],
}


@pytest.mark.parametrize("what", some(BREAKS, [*BREAKS][:2]))
@pytest.mark.parametrize("method", some(["lt_sft", "spiel"], ["spiel"]))
def test_broken_off_at_a_bad_moment(place: list[str], here: Path, what: str, method: str) -> None:
    settings = config(place, f"method={method}", "train.save_every=2", "train.eval_every=1", "seed=3")
    go(settings, here / "whole")
    for patch in BREAKS[what]:
        kill(settings, here / "again", patch)
    go(settings, here / "again")
    assert differences(here / "whole", here / "again") == []


def test_the_best_change_is_that_of_the_checkpoint(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding makes another step the best, the change of that earlier step must be stored."""
    settings = config(place, "method=lora", "train.save_every=2", "train.eval_every=1")
    qualities = iter([0.0, 5.0, 7.0])
    with monkeypatch.context() as first:
        first.setattr(selection, "sort_key", lambda metrics: (next(qualities),))
        kill(settings, here / "run", after(run, "keep_if_best", 3))
    assert read_description(here / "run" / "delta")["step"] == 3
    monkeypatch.setattr(selection, "sort_key", lambda metrics: (1.0,))
    result, _ = go(settings, here / "run")
    assert result["best_step"] == 2
    assert read_description(here / "run" / "delta")["step"] == 2


def test_a_signal_in_the_final_evaluation_loses_no_step(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, "method=lora", "seed=1", "train.eval_every=1")
    saving = replace(
        settings, train=replace(settings.train, save_every=6)
    )  # so that the state after the last step can be compared
    keys = iter(
        [3.0, 9.0, 1.0, 2.0, 3.0, 4.0] * 2
    )  # the second step is the best, so that its state is in the model when the signal comes
    monkeypatch.setattr(selection, "sort_key", lambda metrics: (next(keys),))
    go(saving, here / "whole")
    real, tested = Setup.evaluate, []

    def evaluate(self: Setup, split: str) -> Evaluation:
        tested.append(split)
        if tested.count("test") == 2:  # the first is that of the base
            signal.raise_signal(signal.SIGTERM)
        return real(self, split)

    with monkeypatch.context() as patch:
        patch.setattr(Setup, "evaluate", evaluate)
        assert "after step 6 of 6, which is saved" in interrupt(settings, here / "again").saved
    result, _ = go(settings, here / "again")
    assert result["best_step"] == 2
    assert differences(here / "whole", here / "again") == []
    assert go(replace(settings, run="x"), here / "again") == (result, [])  # it is finished, and stays so


def test_what_is_patient_is_not_broken_off() -> None:
    with Signals() as signals:
        with signals.deferring():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(
                signal.SIGTERM
            )  # what a launcher sends after the terminal did is the same signal
            done = "to the end"
        assert done
        with pytest.raises(Interrupted, match="SIGTERM"):
            signals.check()
    with Signals(), pytest.raises(Interrupted, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_was_ignored_from_the_start_stays_ignored() -> None:
    """As under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert (signals.name, signal.getsignal(signal.SIGHUP)) == ("", signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_before_the_first_step_nothing_is_saved(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, "method=lora")
    real = Setup.evaluate

    def evaluate(self: Setup, split: str) -> Evaluation:
        signal.raise_signal(signal.SIGTERM)
        return real(self, split)

    with monkeypatch.context() as patch:
        patch.setattr(Setup, "evaluate", evaluate)
        assert interrupt(settings, here / "run").saved == ""
    assert not (here / "run" / "checkpoints").exists()
    _, said = go(settings, here / "run")
    assert any("starts from the beginning" in line for line in said)


def test_the_clock_counts_the_time_before_the_break(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock advances by a second at every call: a run of 3.5 s makes four steps, interrupted or not."""
    clock = iter(range(1000))
    monkeypatch.setattr(
        run, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), strftime=time.strftime)
    )
    settings = config(place, "method=lora", "train.max_seconds=3.5", "train.eval_every=3")
    (whole, _), (again, _) = (
        go(settings, here / "whole"),
        go(settings, here / "again", (1, 2, 3, 4)),
    )  # the last: after the loop
    assert (whole["steps"], again["steps"]) == (4, 4)
    assert differences(here / "whole", here / "again") == []


def test_patience_counts_the_validations_before_the_break(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, "method=lora", "train.patience=2", "train.eval_every=1")
    for name, stops in (("whole", ()), ("again", (1, 2, 3, 4))):  # the last: after the loop
        qualities = iter([1.0, 5.0, 4.0, 3.0, 9.0, 10.0])
        monkeypatch.setattr(selection, "sort_key", lambda metrics, each=qualities: (next(each),))
        result, _ = go(settings, here / name, stops)
        assert (result["steps"], result["best_step"]) == (4, 2)
    assert differences(here / "whole", here / "again") == []


def test_patience_waits_for_the_asked_sparsity(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three dense steps, three sparse ones, and each validation worse than the one before."""
    qualities = iter([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    monkeypatch.setattr(selection, "sort_key", lambda metrics: (next(qualities),))
    result, said = go(
        config(place, "method=lt_sft", "schedule.dense=0.5", "train.patience=1", "train.eval_every=1"),
        here / "run",
    )
    assert (result["steps"], result["best_step"], result["suspect"]) == (5, 4, [])
    assert said[-1] == "Stopped after 5 of 6 steps: train.patience=1, the best validation was at step 4."


def test_the_base_is_measured_once(place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = run.Training.evaluate_base, []
    monkeypatch.setattr(run.Training, "evaluate_base", lambda self: (calls.append(1), real(self))[1])
    go(config(place, "method=lora"), here / "run", (1, 3))
    assert len(calls) == 1


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(place: list[str], here: Path) -> None:
    settings = config(place, "method=lora", "train.save_every=1", "train.keep_last=3")
    go(settings, here / "whole")
    kill(settings, here / "again", after(checkpoint, "save", 4))
    newest = here / "again" / "checkpoints" / "step-4" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    _, said = go(settings, here / "again")
    assert any("step-4 is skipped" in line for line in said)
    assert any("from step 3" in line for line in said)
    assert differences(here / "whole", here / "again") == []


def test_resume_takes_only_what_cannot_change_the_result(place: list[str], here: Path) -> None:
    settings = config(place, "method=lora")
    go(settings, here / "outputs" / "t" / "r")
    with pytest.raises(ConfigError) as refused:
        resume.frozen(
            here / "outputs" / "t" / "r",
            ["train.steps=9", "seed=2", "run=x", "train.save_every=2", "method=snell", "logger.project=p"],
        )
    assert [fault.partition(":")[0] for fault in refused.value.faults] == [
        "train.steps=9",
        "seed=2",
        "run=x",
        "method=snell",
    ]
    taken = resume.frozen(
        here / "outputs" / "t" / "r", ["train.save_every=2", "train.keep_last=null", "logger.project=p"]
    )
    assert (taken.train.save_every, taken.train.keep_last, taken.logger.project) == (2, None, "p")
    assert taken.hash() == settings.hash()
    with pytest.raises(ConfigError, match=r"no config.yaml of a run is there"):
        resume.frozen(here, [])


def test_it_resumes_with_the_same_number_of_threads(place: list[str], here: Path) -> None:
    settings, ours = config(place, "method=lora", "train.threads=null"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert interrupt(settings, here / "run", 2).name == "SIGTERM"
        torch.set_num_threads(2)
        result, said = go(settings, here / "run")
    finally:
        torch.set_num_threads(ours)
    assert result["threads"] == 3
    assert "Using 3 threads instead of 2, as the earlier steps did." in said


def test_another_number_of_processes_is_reported_and_recorded(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, "method=lora", "seed=2")
    interrupt(settings, here / "run", 2)
    assert resume.processes(here / "run") == 1
    real = checkpoints.read_progress

    def of_two_processes(*given: Any) -> ProgressRecord:
        return replace(real(*given), processes=2)

    monkeypatch.setattr(checkpoints, "read_progress", of_two_processes)
    result, said = go(settings, here / "run")
    assert "steps up to 3 were made by 2 processes and later ones by 1" in result["warnings"][0]
    assert f"Warning: {result['warnings'][0]}." in said
    assert resume.processes(here / "nowhere") is None


def test_an_altered_configuration_is_not_resumed(place: list[str], here: Path) -> None:
    """Of an unfinished run, whose checkpoints know with what they were made."""
    interrupt(config(place, "method=lora"), here / "run", 2)
    file = here / "run" / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.02", "lr: 0.2"))
    with pytest.raises(
        ConfigError,
        match=r"config.yaml is not what .*step-3 was trained with: optimizer.lr is 0.2 there and 0.02 here",
    ):
        go(load([], None, file), here / "run")


def test_a_run_in_use_is_refused_before_anything_is_loaded(
    place: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "prepare", lambda settings: pytest.fail("loaded"))
    with lock.holding_lock(here / "run"), pytest.raises(ConfigError, match="is in use by"):
        go(config(place, "method=lora"), here / "run")


def test_state_json_says_when_and_where(place: list[str], here: Path) -> None:
    go(config(place, "method=lora", "train.save_every=3"), here / "run")
    state = json.loads((here / "run" / "checkpoints" / "step-6" / "state.json").read_text())
    assert (state["number"], state["extra"]["best_step"] in (2, 4, 6), len(state["extra"]["seconds"])) == (
        6,
        True,
        6,
    )
