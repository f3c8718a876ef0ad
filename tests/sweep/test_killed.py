"""End a sweep in many ways: no finished run is lost, and no run is made twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.sweep.grid import Point
from finetune.sweep.pool import Interrupted, Pool
from finetune.sweep.process import Process

from .conftest import alive, gone, pid, point, starts

pytestmark = pytest.mark.processes

Make = Callable[..., list[Point]]
SWEEP = """
import sys
sys.path[:0] = {path!r}
from tests.sweep.conftest import point, stubbed
from finetune.sweep import process, freeze
from finetune.sweep.pool import Pool, Interrupted
{child}
points = [point(seed) for seed in {seeds}]
freeze(points)
try:
    Pool({jobs}, print, gpus=[]).run(points)
except Interrupted as error:
    print("interrupted by", error)
    sys.exit(130)
"""
STUBBED = "process.run_command, process.FORKS = stubbed, False"
BOUND = """
import os
CODE = '''
import runpy, sys
from finetune.launch.start import end_with
end_with(int(sys.argv.pop(1)))
runpy.run_path(sys.argv.pop(1))
'''
process.FORKS = False
process.run_command = lambda p, options: [sys.executable, "-c", CODE, str(os.getpid()), *stubbed(p)[3:]]
"""
ROOT = Path(__file__).parents[2]


def sweep(seeds: list[int], jobs: int = 2, child: str = STUBBED) -> subprocess.Popen[str]:
    code = SWEEP.format(path=[str(ROOT)], seeds=seeds, jobs=jobs, child=child)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_sweep_leaves_no_child(stub: Make, number: signal.Signals) -> None:
    slow = [point(60), point(61)]
    parent = sweep([60, 61])
    _until(lambda: all(p.folder.metrics.exists() for p in slow))
    parent.send_signal(number)
    said, _ = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert f"interrupted by {number.name}" in said
    assert all(gone(p) and not p.folder.result.exists() for p in slow)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_children_end_with_a_parent_that_is_killed(stub: Make) -> None:
    slow = [point(60), point(61)]
    parent = sweep([60, 61], child=BOUND)
    _until(lambda: all(p.folder.metrics.exists() for p in slow))
    parent.kill()
    parent.communicate()
    assert all(gone(p) for p in slow)
    assert not any(p.folder.result.exists() for p in slow)  # left alone, they would have finished


def test_a_sweep_killed_at_any_time_ends_like_one_that_was_not(stub: Make) -> None:
    seeds = [1, 2, 60, 3, 102, 4]
    points = [point(seed) for seed in seeds]
    for after in (0.0, 0.15, 0.6):
        parent = sweep(seeds, child=BOUND)
        _until(lambda: any(starts(p) for p in points))
        time.sleep(after)
        parent.kill()
        parent.communicate()
        _until(lambda: all(not starts(p) or not alive(pid(p)) for p in points))
    results = Pool(2, lambda line: None, gpus=[], attempts=2).run(points)
    assert [results[p.folder.path]["metrics"]["test"]["accuracy"] for p in points] == [
        seed / 100 for seed in seeds
    ]
    for p in points:
        assert [json.loads(line)["step"] for line in p.folder.metrics.read_text().splitlines()] == list(
            range(1, 11)
        )


def test_two_sweeps_of_one_folder_share_the_work(stub: Make) -> None:
    seeds = list(range(8))
    points = [point(seed) for seed in seeds]
    both = [sweep(seeds), sweep(seeds)]
    for parent in both:
        said, _ = parent.communicate(timeout=60)
        assert parent.returncode == 0, said
    assert all(p.folder.finished for p in points)
    assert [starts(p) for p in points] == [1] * 8


def test_a_second_interruption_does_not_wait(stub: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    (slow,) = stub(60)
    stops = list[float]()

    def stop(self: Process, why: str, grace: float = 10.0) -> dict[str, str]:
        stops.append(grace)
        if len(stops) == 1:
            raise KeyboardInterrupt
        return ended(self, why, grace)

    ended = Process.stop
    monkeypatch.setattr(Process, "stop", stop)

    def interrupt(p: Pool) -> None:
        if p.running and slow.folder.metrics.exists():
            raise Interrupted("SIGINT")

    with pytest.raises(Interrupted):
        Pool(1, lambda line: None, gpus=[], update=interrupt).run([slow])
    assert stops == [10.0, 0.0]
    assert gone(slow)
