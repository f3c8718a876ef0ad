"""Ctrl-C, SIGTERM and SIGHUP on the real command: exit code 130, the command to resume, nothing lost."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.launch.start import NO_OPTIONS
from finetune.sweep import grid, process
from finetune.sweep.process import Process

from ..support import task
from ..support.nursery import Child, Nursery, nursery
from ..support.same_run import differences
from ..sweep.conftest import point

pytestmark = pytest.mark.processes

RUN = Path("outputs", "t", "r")
STEPS = 12


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("said")) as made:
        yield made


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of some seconds."""
    chosen = [
        "method=spiel",
        "schedule.every=4",
        "method.window=2",
        f"train.steps={STEPS}",
        "train.eval_every=3",
    ]
    return ["train", *task.make(tmp_path_factory.mktemp("task")), *chosen, "run=r", "train.save_every=12"]


@pytest.fixture(scope="module")
def whole(begin: Nursery, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert begin.run(*words, folder=folder).wait() == 0
    return folder / RUN


def lines(child: Child) -> int:
    file = child.folder / RUN / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def said_command(child: Child) -> list[str]:
    """The words of the command that is told in the last line."""
    last = child.said.splitlines()[-1]
    assert last.startswith("Stopped by SIG"), child.said
    program, *rest = shlex.split(last.partition("To continue: ")[2])
    assert program == "finetune"
    return rest


SENT = [
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    signal.SIGTERM,
    pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("number", SENT)
def test_the_step_is_saved_and_the_printed_command_ends_the_run_the_same(
    begin: Nursery, words: list[str], whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    child = begin.start(
        *words, "train.workers=2" if number == signal.SIGTERM else "train.workers=0", folder=tmp_path
    )
    assert child.until(lambda: lines(child) >= 2), child.said
    child.kill(number, group=True)  # as a terminal and a scheduler do, to the workers too
    assert child.wait() == 130
    assert f"Stopped by {number.name} after step " in child.said
    (saved,) = (tmp_path / RUN / "checkpoints").iterdir()
    assert f"{saved.relative_to(tmp_path)}. To continue" in child.said
    assert not (tmp_path / RUN / "result.json").exists()
    command = said_command(child)
    assert command == ["train", "--resume", str(RUN)]
    again = begin.run(*command, "train.save_every=6", folder=tmp_path)
    assert again.wait() == 0, again.said
    assert f"Resuming from step {saved.name.removeprefix('step-')}" in again.said
    assert [
        words
        for words in differences(whole, tmp_path / RUN)
        if "config_hash" not in words and "group_hash" not in words
    ] == []
    assert "Resuming from step" in (tmp_path / RUN / "log.txt").read_text()
    finished = begin.run(*command, "--json", folder=tmp_path)
    assert finished.wait() == 0
    assert "nothing was trained" in finished.said
    assert json.loads(finished.out) == json.loads((tmp_path / RUN / "result.json").read_text())


def test_before_the_first_step_it_ends_at_once(
    begin: Nursery, words: list[str], whole: Path, tmp_path: Path
) -> None:
    child = begin.start(*words, folder=tmp_path)
    assert child.until((tmp_path / RUN / "config.yaml").exists), child.said  # measuring the base
    child.kill(signal.SIGTERM)
    assert child.wait() == 130
    assert child.said.count("Stopped by SIGTERM. To continue: ") == 1
    assert not (tmp_path / RUN / "checkpoints").exists()
    again = begin.run(*said_command(child), folder=tmp_path)
    assert again.wait() == 0, again.said
    assert differences(whole, tmp_path / RUN) == []


def test_before_there_is_a_run_the_command_itself_is_shown(
    begin: Nursery, words: list[str], tmp_path: Path
) -> None:
    child = begin.start(*words, folder=tmp_path)
    assert child.until(lambda: catches(child, signal.SIGTERM)), child.said
    child.kill(signal.SIGTERM)
    assert child.wait() == 130
    assert said_command(child) == words
    assert not list(tmp_path.iterdir())


def catches(child: Child, number: int) -> bool:
    """Whether a process has a handler for a signal, as Linux tells it."""
    status = Path(f"/proc/{child.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


PATIENT = """
import time
from finetune.system.signals import Signals
with Signals() as signals, signals.deferring():
    print("ready", flush=True)
    while not signals.name:
        time.sleep(0.01)
    print("came", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_second_signal_does_not_wait_for_the_step() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PATIENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as step:
        assert step.stdout
        assert step.stderr
        assert step.stdout.readline() == "ready\n"
        step.send_signal(signal.SIGTERM)
        assert step.stdout.readline() == "came\n"
        while step.poll() is None:
            step.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        assert step.returncode == 130
        first, second = step.stderr.read().splitlines()
        assert first.startswith("SIGTERM: saving the run at the end of this step")
        assert second.startswith("SIGTERM, then SIGTERM: ended at once")


def test_two_signals_harm_nothing(begin: Nursery, words: list[str], whole: Path, tmp_path: Path) -> None:
    child = begin.start(*words[:-1], "train.save_every=1", folder=tmp_path)
    assert child.until(lambda: lines(child) >= 3), child.said
    while child.alive:
        child.kill(signal.SIGTERM)
        time.sleep(0.02)
    assert child.wait() in (
        130,
        -signal.SIGTERM,
    )  # the last one may come when it has ended, but for the interpreter
    assert "SIGTERM: saving the run" in child.said or "then SIGTERM: ended at once" in child.said
    again = begin.run("train", "--resume", str(RUN), folder=tmp_path)
    assert again.wait() == 0, again.said
    assert differences(whole, tmp_path / RUN) == []


def test_resume_refuses_what_it_cannot_do(
    begin: Nursery, words: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = whole.parents[2]
    for more, fault in (
        (["train.steps=20", "seed=4"], "train.steps=20: --resume continues a run as it was started"),
        (["--config", str(whole / "config.yaml")], "--resume outputs/t/r goes with neither --config"),
    ):
        refused = begin.run("train", "--resume", str(RUN), *more, folder=folder)
        assert refused.wait() == 2
        assert all(line.startswith("Error: ") for line in refused.said.splitlines())
        assert fault in refused.said
    missing = begin.run("train", "--resume", "nowhere", folder=tmp_path)
    assert missing.wait() == 2
    assert (
        missing.said == "Error: --resume nowhere: no config.yaml of a run is there. "
        "Give the folder of a run, outputs/NAME/RUN.\n"
    )


SAVES = """
import signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
def came(number, frame):
    with (run / "came").open("a") as file:
        file.write(f"{number} ")
signal.signal(signal.SIGTERM, came)
(run / "ready").touch()
signal.pause()
while not (run / "may end").exists():
    time.sleep(0.01)
sys.exit(130)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    """A sweep's child that needs a while to save its step when it is asked to end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        process, "run_command", lambda of, options: [sys.executable, "-S", "-c", SAVES, str(of.folder.path)]
    )
    one = point(1)
    grid.freeze([one])
    made = Process.start(one, NO_OPTIONS)
    assert made
    _until((one.folder.path / "ready").exists)
    return made


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_sweep_asks_its_child_once_and_leaves_it_the_time_to_save(child: Process) -> None:
    run = child.point.folder.path
    child.ask_to_stop("interrupted")
    _until((run / "came").exists)
    (run / "may end").touch()
    assert child.stop("interrupted") == {"status": "stopped", "error": "interrupted"}
    assert (run / "came").read_text() == "15 "
    assert not child.point.folder.result.exists()


def test_a_child_that_another_asked_to_end_is_run_again_by_the_next_sweep(child: Process) -> None:
    run, result = child.point.folder.path, None
    child._process.terminate()
    (run / "may end").touch()
    while result is None:
        result = child.poll()
    assert (result["status"], result["signal"]) == ("failed", 15)
    assert process.should_rerun(child.point.folder.read_result())
