"""Several runs at once: all fates of a run, and of the process that runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finetune.launch.start import NO_OPTIONS
from finetune.sweep import pool as pools
from finetune.sweep.grid import Point
from finetune.sweep.pool import Pool
from finetune.sweep.process import DiskFull, Process, take_lock
from finetune.system import environment

from .conftest import gone, starts

Make = Callable[..., list[Point]]


def runs_at_once(points: list[Point], places: int, **more: Any) -> int:
    seen = []
    pool = Pool(places, lambda line: None, gpus=[], update=lambda p: seen.append(len(p.running)), **more)
    pool.run(points)
    return max(seen)


@pytest.mark.processes
def test_each_is_run_once_and_as_many_at_once_as_asked(stub: Make) -> None:
    points = stub(*range(6))
    assert runs_at_once(points, 3) == 3
    assert [starts(p) for p in points] == [1] * 6
    assert [p.folder.read_result()["metrics"]["test"]["accuracy"] for p in points] == [
        seed / 100 for seed in range(6)
    ]
    assert runs_at_once(points, 3) == 0
    assert [starts(p) for p in points] == [1] * 6


@pytest.mark.processes
def test_failures_are_rows_and_only_retried_when_asked(stub: Make) -> None:
    said = list[str]()
    points = stub(1, 101, 104)
    bad, odd = points[1:]
    results = Pool(1, said.append, gpus=[]).run(points)
    assert [results[p.folder.path]["status"] for p in points] == ["finished", "failed", "failed"]
    assert [p.folder.read_result()["error"] for p in points] == [None, "no data here", "ValueError: odd"]
    assert any("failed (no data here)" in line for line in said)
    assert "a warning" in bad.folder.log.read_text()
    assert "ValueError: odd" in odd.folder.log.read_text()
    assert odd.folder.read_result()["steps"] == 10
    Pool(1, said.append, gpus=[]).run(points)
    assert [starts(p) for p in points] == [1, 1, 1]
    Pool(1, said.append, gpus=[], retry=True).run(points)
    assert [starts(p) for p in points] == [1, 2, 2]


@pytest.mark.processes
def test_attempts_cure_what_may_pass_and_no_mistakes(stub: Make) -> None:
    points = stub(101, 102, 104)
    results = Pool(2, lambda line: None, gpus=[], attempts=3).run(points)
    assert [starts(p) for p in points] == [1, 2, 3]
    assert [results[p.folder.path]["status"] for p in points] == ["failed", "finished", "failed"]


@pytest.mark.processes
def test_a_killed_child_is_recorded_and_the_next_sweep_resumes_it(stub: Make) -> None:
    killed, other = points = stub(102, 3)
    results = Pool(1, lambda line: None, gpus=[]).run(points)
    first = results[killed.folder.path]
    assert (first["status"], first["signal"]) == ("failed", 9)
    assert "signal 9 (SIGKILL)" in first["error"]
    assert json.loads(killed.folder.result.read_text())["signal"] == 9
    assert results[other.folder.path]["status"] == "finished"
    assert Pool(1, lambda line: None, gpus=[]).run(points)[killed.folder.path]["status"] == "finished"
    assert [starts(p) for p in points] == [2, 1]


@pytest.mark.processes
def test_fail_fast_ends_the_others(stub: Make) -> None:
    slow, bad, later = points = stub(60, 101, 1)
    results = Pool(2, lambda line: None, gpus=[], fail_fast=True).run(points)
    assert set(results) == {bad.folder.path}
    assert starts(later) == 0
    assert not slow.folder.result.exists()
    assert gone(slow)


@pytest.mark.processes
def test_a_generator_chooses_by_what_has_ended(stub: Make) -> None:
    told = list[int]()

    def choose() -> Iterator[Point | None]:
        for seed in (1, 2, 3):
            yield stub(seed)[0]
            while len(told) < seed:
                yield None

    Pool(2, lambda line: None, gpus=[]).run(choose(), ended=lambda p, result: told.append(result["seed"]))
    assert told == [1, 2, 3]


@pytest.mark.processes
def test_a_verdict_stops_a_run_and_leaves_no_result(stub: Make) -> None:
    slow, quick = points = stub(60, 1)
    results = Pool(2, lambda line: None, gpus=[]).run(
        points, verdict=lambda p: "no good" if p is slow and starts(p) else None
    )
    assert results[slow.folder.path] == {"status": "stopped", "error": "no good"}
    assert results[quick.folder.path]["status"] == "finished"
    assert not slow.folder.result.exists()
    assert gone(slow)


@pytest.mark.processes
def test_a_full_disk_ends_the_sweep_and_is_no_failure(stub: Make) -> None:
    done, full, later = points = stub(1, 103, 2)
    with pytest.raises(DiskFull, match="No space left on device"):
        Pool(1, lambda line: None, gpus=[]).run(points)
    assert done.folder.finished
    assert not full.folder.result.exists()
    assert starts(later) == 0


@pytest.mark.processes
def test_a_disk_that_is_really_full(stub: Make, tmp_path: Path) -> None:
    disk = tmp_path / "outputs"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("a small disk can be mounted by root only")
    try:
        points = stub(1, 2)
        Pool(1, lambda line: None, gpus=[]).run(points[:1])
        before = points[0].folder.result.read_bytes()
        handle = os.open(disk / "fill", os.O_WRONLY | os.O_CREAT)
        with suppress(OSError):
            while True:
                os.write(handle, bytes(4096))
        os.close(handle)
        with pytest.raises(DiskFull):
            Pool(1, lambda line: None, gpus=[]).run(points)
        assert points[0].folder.result.read_bytes() == before
        assert not points[1].folder.result.exists()
        (disk / "fill").unlink()
        Pool(1, lambda line: None, gpus=[]).run(points)
        assert points[1].folder.finished
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.processes
def test_each_gpu_has_one_run_at_a_time(stub: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    points = stub(*range(6))
    at_once = list[list[str]]()
    Pool(
        4,
        lambda line: None,
        gpus=["3", "5"],
        update=lambda p: at_once.append([r.device or "" for r in p.running]),
    ).run(points)
    assert max(map(len, at_once)) == 2
    assert all(len(set(devices)) == len(devices) for devices in at_once)
    assert {(p.folder.path / "started").read_text().split()[1] for p in points} == {"3", "5"}


@pytest.mark.processes
def test_devices_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")
    assert environment.cuda_devices() == ["2", "GPU-abc"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert environment.cuda_devices() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert environment.cuda_devices() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert environment.cuda_devices() == []


def test_threads_are_divided_and_a_lower_wish_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "count_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    threads = Pool(3, print, gpus=[])._threads
    made = environment.child_environment(threads, "")
    assert threads == 2
    assert [
        made[name]
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
    ] == ["2", "1", "PASSIVE", ""]


@pytest.mark.processes
def test_what_another_process_runs_is_waited_for_and_not_run_again(stub: Make) -> None:
    first, second = stub(60, 1)
    other = Process.start(first, NO_OPTIONS)
    assert other
    assert Process.start(first, NO_OPTIONS) is None
    said = list[str]()
    order = list[str]()
    with_other = threading.Thread(target=_finish, args=[other])
    with_other.start()
    results = Pool(1, said.append, gpus=[]).run(
        [first, second], ended=lambda p, result: order.append(p.folder.path.name)
    )
    with_other.join()
    assert [starts(p) for p in (first, second)] == [1, 1]
    assert order == [second.folder.path.name, first.folder.path.name]
    assert all(result["status"] == "finished" for result in results.values())
    assert any("is being run by process" in line for line in said)


def _finish(process: Process) -> None:
    while process.poll() is None:
        time.sleep(0.02)


@pytest.mark.processes
def test_what_was_finished_meanwhile_is_not_started(stub: Make) -> None:
    (point,) = stub(1)
    Pool(1, lambda line: None, gpus=[]).run([point])
    before = point.folder.result.read_bytes()
    assert Process.start(point, NO_OPTIONS) is None
    assert point.folder.result.read_bytes() == before
    held = take_lock(point.folder.path)
    assert held is not None
    os.close(held)


@pytest.mark.processes
def test_the_lock_outlives_the_sweep_that_took_it(stub: Make) -> None:
    """After kill -9 of a sweep whose child lives on, the child's lock keeps the run from starting again."""
    (slow,) = stub(60)
    process = Process.start(slow, NO_OPTIONS)
    assert process
    os.close(process._lock)
    assert take_lock(slow.folder.path) is None
    os.killpg(process._process.pid, signal.SIGKILL)
    process._process.communicate()
    taken = take_lock(slow.folder.path)
    assert taken is not None
    os.close(taken)


@pytest.mark.processes
def test_a_run_that_is_offered_twice_is_run_once(stub: Make) -> None:
    """As a search does that draws the same settings again."""
    (point,) = stub(1)
    ended = list[Point]()
    Pool(1, lambda line: None, gpus=[]).run([point, point], lambda run, result: ended.append(run))
    assert ended == [point, point]
    assert starts(point) == 1
