"""Children of the fork server end with the sweep, and train to the same bits as fresh processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune import sweep
from finetune.launch import forkserver
from finetune.launch.start import NO_OPTIONS
from finetune.sweep.process import Process
from finetune.system.environment import child_environment

from ..sweep.conftest import alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux only")


@pytest.fixture
def lock_handle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """An open file, as the lock of a run is; the server imports next to nothing."""
    handle = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    yield handle
    os.close(handle)


def wait_for_child(child: forkserver.Forked) -> tuple[int | None, str]:
    said = child.stderr.read().decode()  # to the end: no other process holds the pipe
    child._process.join(60)
    child.stderr.close()
    return child.poll(), said


@pytest.mark.processes
def test_the_child_trains_a_frozen_configuration_and_reports_what_is_wrong_with_it(
    lock_handle: int, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("method: {name: nope}\n", encoding="utf-8")
    child = forkserver.Forked(
        str(file), NO_OPTIONS, child_environment(1, None) | {"COLUMNS": "80"}, lock_handle
    )
    code, said = wait_for_child(child)
    assert code == 2
    assert "Error: method=nope is not known." in said
    assert child.pid != os.getpid()


@pytest.mark.processes
def test_a_killed_child_says_by_which_signal(lock_handle: int) -> None:
    child = forkserver.Forked("config.yaml", NO_OPTIONS, child_environment(1, None), lock_handle)
    os.kill(child.pid, signal.SIGKILL)
    assert wait_for_child(child)[0] == -signal.SIGKILL


@pytest.mark.processes
def test_children_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, time; from finetune.launch import forkserver, start\n"
        "child = forkserver.Forked('config.yaml', start.NO_OPTIONS, dict(os.environ), 0)\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    with parent.stdout:
        assert parent.stdout.read() == ""
    end = time.monotonic() + 30
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.slow
def test_a_forked_run_is_the_run_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = []
    for name, how in (("warm", True), ("fresh", False)):
        (point,) = sweep.list_points(
            [
                "method=snell",
                "train.steps=3",
                "train.device=cpu",
                "dataset.retention_images=0",
                f"name={name}",
            ]
        )
        sweep.freeze([point])
        process = Process.start(point, NO_OPTIONS, threads=1, fork=how)
        assert process
        assert isinstance(process._process, forkserver.Forked) is how
        while (result := process.poll()) is None:
            time.sleep(0.05)
        assert result["status"] == "finished", result["error"]
        changes.append(
            (
                (point.folder.delta / "delta.safetensors").read_bytes(),
                result["metrics"],
                point.folder.predictions.read_bytes(),
            )
        )
    assert changes[0] == changes[1]
