"""Check that one process at a time works on a run, also after kills and on shared file systems."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.storage import lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from finetune.errors import ConfigError
from finetune.storage.lock import holding_lock
try:
    with holding_lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(error, flush=True)
"""


@contextmanager
def other(folder: Path, **settings: object) -> Iterator[subprocess.Popen[str]]:
    """Start another process that takes the lock of ``folder`` and holds it until its input ends."""
    command = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(folder)]
    options: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **settings}
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_it_says_who_holds_it_and_nobody_afterwards(tmp_path: Path) -> None:
    with lock.holding_lock(tmp_path / "outputs" / "run"):
        told = json.loads((tmp_path / "outputs" / "run" / ".lock").read_text())
        assert (told["pid"], told["host"]) == (os.getpid(), socket.gethostname())
        assert (
            lock.lock_holder(tmp_path / "outputs" / "run")
            == f"process {os.getpid()} on {socket.gethostname()}"
        )
    assert lock.lock_holder(tmp_path / "outputs" / "run") == ""
    assert json.loads((tmp_path / "outputs" / "run" / ".lock").read_text()) == {"started": told["started"]}


@pytest.mark.processes
def test_a_live_holder_is_named_and_a_dead_one_is_followed(tmp_path: Path) -> None:
    with other(tmp_path) as holder:
        assert said(holder) == "held"
        with (
            pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} on {socket.gethostname()}"),
            lock.holding_lock(tmp_path),
        ):
            pytest.fail("two at once")
        assert lock.try_lock(tmp_path) is None
        with pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} "):
            lock.refuse_if_locked(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert lock.lock_holder(tmp_path).startswith(
            f"process {holder.pid} "
        )  # it had no time to take its name away
    lock.refuse_if_locked(tmp_path)
    lock.refuse_if_locked(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with lock.holding_lock(tmp_path):
        assert lock.lock_holder(tmp_path).startswith(f"process {os.getpid()} ")


def test_whoever_follows_a_killed_process_clears_up_after_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-2.4194305.old").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-4.4194305.tmp").mkdir()
    (tmp_path / ".result.json.4194305.tmp").write_text("half")
    with lock.holding_lock(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {".lock", "checkpoints", "step-2"}


@pytest.mark.processes
def test_a_child_may_be_given_the_lock_and_takes_no_second_one(tmp_path: Path) -> None:
    handle = lock.try_lock(tmp_path)
    assert handle is not None
    lock.sign_lock(handle, 12)
    environment = {**os.environ, lock.INHERITED: str(handle)}
    with other(tmp_path, pass_fds=(handle,), env=environment) as child:
        assert said(child) == "held"
        assert lock.lock_holder(tmp_path).startswith("process 12 ")
        lock.release_lock(handle)
        assert lock.try_lock(tmp_path) is None  # the child still has it
    again = lock.try_lock(tmp_path)
    assert again is not None
    with other(tmp_path, env={**os.environ, lock.INHERITED: "57"}) as child:  # no such file
        assert "is in use" in said(child)
    (tmp_path / "elsewhere").mkdir()
    with other(
        tmp_path / "elsewhere", pass_fds=(again,), env={**os.environ, lock.INHERITED: str(again)}
    ) as child:  # that of another folder
        assert said(child) == "held"
        assert lock.try_lock(tmp_path / "elsewhere") is None
    lock.release_lock(again)


@pytest.mark.processes
def test_a_worker_that_outlives_the_holder_does_not_hold(tmp_path: Path) -> None:
    (started, says), (ends, keeps) = os.pipe(), os.pipe()
    with lock.holding_lock(tmp_path):
        worker = os.fork()
        if worker == 0:
            os.write(says, b"!")
            os.close(keeps)
            os.read(ends, 1)  # until the pipe is closed
            os._exit(0)
        os.read(started, 1)
    handle = lock.try_lock(tmp_path)
    os.close(keeps)
    os.waitpid(worker, 0)
    for pipe in (started, says, ends):
        os.close(pipe)
    assert handle is not None
    lock.release_lock(handle)


def test_a_lock_that_was_removed_meanwhile_keeps_nobody_out_and_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def flock(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(handle)
        real(handle, how)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    handle = lock.try_lock(tmp_path)
    assert handle is not None
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(handle), (tmp_path / ".lock").stat())
    lock.release_lock(handle)


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs"])
def test_another_machine_that_flock_may_not_reach_is_not_overrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"pid": 12, "host": "node7", "started": 0}))
    monkeypatch.setattr(lock, "_file_system", lambda folder: kind)
    with (
        pytest.raises(
            ConfigError, match=r"process 12 on node7, which did not report its end.* remove .*/\.lock"
        ),
        lock.holding_lock(tmp_path),
    ):
        pytest.fail("two at once")
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "node7"
    (tmp_path / ".lock").unlink()
    with lock.holding_lock(tmp_path):
        pass
    with lock.holding_lock(tmp_path):  # the last one said that it ended
        pass


def test_on_a_disk_of_this_machine_another_name_was_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"pid": 12, "host": "an-earlier-container", "started": 0}))
    monkeypatch.setattr(lock, "_file_system", lambda folder: "overlay")
    with lock.holding_lock(tmp_path):
        assert lock.lock_holder(tmp_path).startswith(f"process {os.getpid()} ")


@pytest.mark.processes
def test_the_kind_of_a_file_system_is_what_linux_says() -> None:
    assert lock._file_system(Path("/proc/self")) == "proc"
    found = subprocess.run(
        ["stat", "-f", "-c", "%T", "/"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert lock._file_system(Path("/")).startswith(found[:3])


@pytest.mark.parametrize("number", lock.UNSUPPORTED)
def test_where_there_are_no_locks_the_name_has_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        lock.holding_lock(tmp_path),
        pytest.raises(ConfigError, match=f"process {os.getpid()} "),
        lock.holding_lock(tmp_path),
    ):
        pytest.fail("two at once")
    (tmp_path / ".lock").write_text(json.dumps({"pid": 4194305, "host": socket.gethostname(), "started": 0}))
    with lock.holding_lock(tmp_path):
        pass


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": "x", "host": 1}', '{"pid": 1e999, "host": "h"}', "[" * 5000]
)
def test_what_stands_in_the_file_need_not_make_sense(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    assert lock.lock_holder(tmp_path) == ""
    with lock.holding_lock(tmp_path):
        assert lock.lock_holder(tmp_path)


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match="cannot be written"), lock.holding_lock(tmp_path / "run"):
        pytest.fail("through a link")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_that_vanishes_or_is_replaced_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def replaced() -> None:
        with lock.holding_lock(folder):
            folder.rename(tmp_path / "moved")
            folder.mkdir()

    with pytest.raises(FileNotFoundError) as caught:
        replaced()
    with lock.holding_lock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("{}")
        (tmp_path / "run" / ".lock").unlink()  # the run itself is still there
    assert caught.value.errno == errno.ENOENT
    with (
        pytest.raises(ConfigError, match=r"The run folder .* cannot be written: Not a directory"),
        lock.holding_lock(tmp_path / "moved" / ".lock" / "run"),
    ):
        pytest.fail("in a file")
