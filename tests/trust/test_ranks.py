"""``finetune train --processes 2`` and ``accelerate launch -m finetune``, as a user starts them.

There is one run, one voice, one end.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..support import task
from ..support.nursery import nursery
from ..support.same_run import differences

RUN = Path("outputs", "t", "r")
LIMIT = 30.0  # seconds in which the others end after one has died
WAIT = 240.0  # seconds; a process that waits for another would wait for ever

pytestmark = pytest.mark.slow  # every start imports torch in each process


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """45 images for training, so that every epoch's last batch is odd."""
    settings = [
        "run=r",
        "method=lora",
        "method.rank=2",
        "train.steps=12",
        "train.eval_every=4",
        "train.save_every=2",
    ]
    return ["train", *task.make(tmp_path_factory.mktemp("task"), images=63), *settings]


@pytest.fixture(scope="module")
def one(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    logs, folder = tmp_path_factory.mktemp("said"), tmp_path_factory.mktemp("one")
    with nursery(logs) as begin:
        assert begin.run(*words, folder=folder).wait() == 0, (logs / "err").read_text()
    return folder / RUN


def finetune(*words: str) -> list[str]:
    return [sys.executable, "-m", "finetune", *words]


def launched(*words: str) -> list[str]:
    port = str(20000 + os.getpid() % 20000)
    plain = [
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={port}",
    ]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *plain,
        "-m",
        "finetune",
        *words,
    ]  # with GPUs or without: train.device=cpu


@contextmanager
def started(command: list[str], folder: Path, more: dict[str, str] | None = None) -> Iterator[Any]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "PYTHONPATH": str(Path.cwd()),
        **(more or {}),
    }
    environment.pop("RANK", None)
    with (folder / "err").open("wb") as err, (folder / "out").open("wb") as out:
        process = psutil.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for child in [*process.children(recursive=True), process] if process.is_running() else []:
                child.kill()
            process.wait()


def run(command: list[str], folder: Path, more: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    with started(command, folder, more) as process:
        code = process.wait(WAIT)
    return code, (folder / "out").read_text(), (folder / "err").read_text()


def until(process: Any, seen: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not seen():
        assert process.status() != psutil.STATUS_ZOMBIE, "it has ended"
        assert time.monotonic() < end
        time.sleep(0.01)


def steps(folder: Path) -> int:
    file = folder / RUN / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def second(process: Any, folder: Path) -> Any:
    """The training process that does not hold the run's lock."""
    first = json.loads((folder / RUN / ".lock").read_text())["pid"]
    (found,) = [
        c for c in process.children() if c.pid != first and "resource_tracker" not in " ".join(c.cmdline())
    ]
    return found


def test_two_processes_make_the_run_of_one(words: list[str], one: Path, tmp_path: Path) -> None:
    code, out, err = run(finetune(*words, "--processes", "2", "--json"), tmp_path)
    assert code == 0, err
    result, whole = json.loads(out), json.loads((one / "result.json").read_text())
    assert result == json.loads((tmp_path / RUN / "result.json").read_text())
    assert (result["processes"], whole["processes"]) == (2, 1)
    for split, metrics in whole["metrics"].items():
        assert result["metrics"][split] == pytest.approx(metrics, abs=1e-4), split
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / RUN, one)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours if "loss" in line] == pytest.approx(
        [line["loss"] for line in theirs if "loss" in line], abs=1e-4
    )
    assert sorted(p.name for p in (tmp_path / RUN).iterdir()) == sorted(p.name for p in one.iterdir())
    lines = err.splitlines()
    assert len(lines) == len(set(lines)), "nothing is said twice"
    assert "Traceback" not in err
    assert "Warning" not in err


def test_accelerate_launch_makes_the_same_run(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code, out, err = run(launched(*words, "--json"), tmp_path / "a", {"OMP_NUM_THREADS": "1"})
    assert code == 0, err
    assert json.loads(out)["processes"] == 2
    assert run(finetune(*words, "--processes", "2"), tmp_path / "b")[0] == 0
    assert not differences(tmp_path / "a" / RUN, tmp_path / "b" / RUN)
    assert err.count("step 12/12") == 1


@pytest.mark.parametrize(
    "launch", [lambda *w: finetune(*w, "--processes", "2"), launched], ids=["processes", "accelerate"]
)
def test_a_mistake_is_said_once(launch: Callable[..., list[str]], words: list[str], tmp_path: Path) -> None:
    code, out, err = run(
        launch(*[w for w in words if not w.startswith("dataset.path=")], "dataset.path=nowhere"), tmp_path
    )
    assert err.count("Error: dataset.path=nowhere") == 1, err
    assert not (tmp_path / "outputs").exists()
    assert out == ""
    assert code == (1 if launch is launched else 2)  # of accelerate's own


def test_a_killed_process_ends_the_other(words: list[str], tmp_path: Path) -> None:
    slow = list(
        {
            word.partition("=")[0]: word
            for word in [*words, "train.steps=4000", "train.eval_every=null", "train.save_every=10"]
        }.values()
    )
    with started(finetune(*slow, "--processes", "2"), tmp_path) as process:
        until(process, lambda: steps(tmp_path) > 20)
        second(process, tmp_path).kill()
        began = time.monotonic()
        assert process.wait(LIMIT) == 1
        assert time.monotonic() - began < LIMIT
    errors = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("Error")]
    assert errors[0].startswith(
        "Error: Process 1 of 2 was ended by SIGKILL (out of memory?), and the others with it."
    )
    assert errors[0].endswith(f"`finetune train --resume {RUN}` resumes the run.")
    assert len(errors) == 1
    assert not (tmp_path / RUN / "result.json").exists()


def test_a_signal_to_the_launcher_saves_once_and_the_run_resumes_to_the_same_bits(
    words: list[str], tmp_path: Path
) -> None:
    for name in ("broken", "whole"):
        (tmp_path / name).mkdir()
    with started(finetune(*words, "--processes", "2"), tmp_path / "broken") as process:
        until(process, lambda: steps(tmp_path / "broken") >= 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 130
    err = (tmp_path / "broken" / "err").read_text()
    assert err.count("SIGTERM: saving the run at the end of this step") == 1, err
    assert err.splitlines()[-1].startswith("Stopped by SIGTERM after step "), err
    told = shlex.split(err.partition("To continue: finetune ")[2])
    assert told == ["train", "--resume", str(RUN), "--processes", "2"]
    code, _, err = run(finetune(*told[:-2]), tmp_path / "broken")
    assert code == 0, err
    assert "Continuing with 2 processes, as before" in err
    assert run(finetune(*words, "--processes", "2"), tmp_path / "whole")[0] == 0
    assert not differences(tmp_path / "broken" / RUN, tmp_path / "whole" / RUN)


FAILS = """
import os
from finetune.training import session as loop
real = loop.Session._backward
def fails(self, micro):
    if os.environ.get("RANK") == "1" and self.number == 3:
        raise KeyError("no such thing here")
    return real(self, micro)
loop.Session._backward = fails
"""


@pytest.mark.parametrize(
    "launch", [lambda *w: finetune(*w, "--processes", "2"), launched], ids=["processes", "accelerate"]
)
def test_an_exception_in_one_process_ends_all_and_is_shown_first(
    launch: Callable[..., list[str]], words: list[str], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WHEN_IMPORTED)
    (site / "fails.py").write_text(FAILS)
    began = time.monotonic()
    code, _, err = run(launch(*words), tmp_path, {"PYTHONPATH": f"{site}{os.pathsep}{Path.cwd()}"})
    assert code == 1
    assert time.monotonic() - began < WAIT
    errors = [line for line in err.splitlines() if "Error: " in line and "failed unexpectedly" in line]
    assert "no such thing here" in errors[0], err
    if launch is not launched:
        assert len(errors) == 1
        log = Path(errors[0].partition("details in ")[2].partition(";")[0])
        assert "in fails" in log.read_text(), "the traceback of the process that failed is kept"
        log.unlink()


# A process that imports the training loop gets the fault with it.
WHEN_IMPORTED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "finetune.training.run":
            sys.meta_path.remove(self)
            import fails
        return None
sys.meta_path.insert(0, Finder())
"""


def test_a_loss_that_is_not_finite_on_one_process_is_recorded_once(words: list[str], tmp_path: Path) -> None:
    more = [
        "method=full",
        "optimizer.lr=1e20",
        "train.clip=null",
        "optimizer.warmup=0",
        "train.save_every=null",
    ]
    settings = list(
        {word.partition("=")[0]: word for word in [*words, *more] if word != "method.rank=2"}.values()
    )
    code, _, err = run(finetune(*settings, "--processes", "2"), tmp_path)
    assert code == 1
    assert err.count("Error: The loss is ") == 1, err
    result = json.loads((tmp_path / RUN / "result.json").read_text())
    assert result["status"] == "failed"
    assert len(json.loads((tmp_path / RUN / "failure.json").read_text())["ids"]) >= 4


def test_more_processes_inside_of_a_launcher_are_refused(words: list[str], tmp_path: Path) -> None:
    code, _, err = run(finetune(*words, "--processes", "2"), tmp_path, {"LOCAL_RANK": "0"})
    assert (code, err.count("leave one of them out")) == (2, 1)
