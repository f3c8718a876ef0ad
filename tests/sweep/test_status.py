"""What is read of a sweep while it goes, and by another shell."""

from __future__ import annotations

import datetime
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.errors import ConfigError
from finetune.sweep.grid import Point, freeze
from finetune.sweep.lines import last_step, read_last_lines
from finetune.sweep.pool import Pool
from finetune.sweep.process import take_lock
from finetune.sweep.status import Status, announced, duration, entry, show_seconds
from finetune.sweep.watch import Board, table, watch

from .conftest import point

Make = Callable[..., list[Point]]


def listed(points: list[Point]) -> list[dict[str, Any]]:
    return [entry(point, Path("outputs/s")) for point in points]


@pytest.mark.processes
def test_each_state_is_read_from_the_files(stub: Make) -> None:
    points = stub(1, 101, 2, 3, 4)
    done, bad, going, begun = points[:4]
    Pool(1, lambda line: None, gpus=[]).run([done, bad])
    lines = "".join(json.dumps({"step": step, "seconds": 2.0}) + "\n" for step in (1, 2, 3, 4))
    going.folder.metrics.write_text(lines + '{"step": 5, "sec')
    begun.folder.metrics.write_text(lines)
    held = take_lock(going.folder.path)
    with announced(Path("outputs/s"), listed(points), ["seed=1,2"], 2, "finetune sweep seed=1,2"):
        status = Status(Path("outputs/s"))
        states = status.states()
        assert status.alive
    assert not status.alive
    assert held
    assert [state.state for state in states] == ["finished", "failed", "running", "waiting", "waiting"]
    assert [state.step for state in states] == [10, 0, 4, 4, 0]
    assert states[1].error == "no data here"
    assert states[2].seconds_left == 2.0 * 6
    assert states[0].seconds > 0
    states[0], states[1] = replace(states[0], seconds=30.0), replace(states[1], seconds=10.0)
    told = status.summary(states)
    assert {key: told[key] for key in ("finished", "running", "failed", "waiting")} == {
        "finished": 1,
        "running": 1,
        "failed": 1,
        "waiting": 2,
    }
    assert (
        told["seconds_left"] == (12 + 2 * 20) / 2
    )  # the mean of those that ended, for each that waits, two at once


def test_torn_lines_are_left_out(tmp_path: Path, stub: Make) -> None:
    (point,) = stub(1)
    assert read_last_lines(point.folder.metrics) == []
    assert last_step(point.folder) == 0
    point.folder.metrics.write_text('{"step": 1}\n[3]\n{"step": 2}\n{"st')
    assert read_last_lines(point.folder.metrics) == [{"step": 1}, {"step": 2}]
    assert last_step(point.folder) == 2


@pytest.mark.parametrize("what", ["nowhere", "empty", "torn", "other"])
def test_a_folder_that_is_no_sweep(tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what != "nowhere":
        folder.mkdir()
    if what in ("torn", "other"):
        (folder / "sweep.json").write_text('{"points": [' if what == "torn" else '{"points": 3}')
    with pytest.raises(ConfigError, match=str(folder)):
        watch(folder)


@pytest.mark.processes
def test_watching_from_elsewhere_ends_with_the_sweep(stub: Make) -> None:
    points = stub(1, 2, 60, 101)
    said = list[str]()
    begun = threading.Event()

    def work() -> None:
        with announced(Path("outputs/s"), listed(points), [], 1, "finetune sweep x"):
            begun.set()
            Pool(1, lambda line: None, gpus=[]).run(points)

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait()
    code = watch(Path("outputs/s"), said.append)
    worker.join()
    assert code == 1  # one failed
    assert "3 finished, 1 failed of 4" in said[-1]
    assert any("running" in line and "waiting" in line for line in said)


@pytest.mark.processes
def test_the_clock_stops_with_the_sweep(stub: Make) -> None:
    points = stub(1, 2)
    with announced(Path("outputs/s"), listed(points), [], 1, "finetune sweep x"):
        Pool(2, lambda line: None, gpus=[]).run(points)
    file = Path("outputs/s/sweep.json")
    began = time.time() - 3600
    file.write_text(
        json.dumps(
            json.loads(file.read_text())
            | {"started": datetime.datetime.fromtimestamp(began).astimezone().isoformat()}
        )
    )
    for run in points:
        os.utime(run.folder.metrics, (began, began))
        os.utime(run.folder.result, (began + 40, began + 40))
    os.utime(points[1].folder.result, (began + 146, began + 146))
    said = list[str]()
    watch(Path("outputs/s"), said.append)
    assert said == ["outputs/s: 2 finished of 2 (for 2 min)"]


@pytest.mark.processes
def test_watching_a_sweep_that_does_not_run_says_how_to_continue_it(stub: Make) -> None:
    points = stub(1, 2)
    with announced(Path("outputs/s"), listed(points), [], 1, "finetune sweep seed=1,2"):
        pass
    said = list[str]()
    assert watch(Path("outputs/s"), said.append) == 1
    assert (
        said[-1] == "No sweep is running in outputs/s, and 2 of its runs are not finished. "
        "To continue: finetune sweep seed=1,2"
    )
    Pool(2, said.append, gpus=[]).run(points)
    assert watch(Path("outputs/s"), said.append) == 0


@pytest.mark.processes
def test_trials_and_runs_that_are_still_to_be_chosen(stub: Make) -> None:
    points = stub(1, 2)
    trial = point(3, "s/trials")
    freeze([trial])
    listed = [
        entry(trial, Path("outputs/s")),
        *(entry(run, Path("outputs/s")) | {"run": ""} for run in points),
    ]
    with announced(Path("outputs/s"), listed, [], 1, "finetune sweep x") as announce:
        status = Status(Path("outputs/s"))
        Pool(1, lambda line: None, gpus=[]).run([trial])
        assert [state.state for state in status.states()] == ["finished", "waiting", "waiting"]
        announce([listed[0], *(entry(run, Path("outputs/s")) for run in points)])
        Pool(1, lambda line: None, gpus=[]).run(points)
        assert [state.state for state in status.states()] == ["finished"] * 3


@pytest.mark.parametrize("run", ["..", "/", "../s", "trials/..", "trials/../x", "/etc", "a/b"])
def test_a_run_outside_the_folder_is_refused(stub: Make, run: str) -> None:
    (inside,) = stub(1)
    with (
        announced(Path("outputs/s"), [entry(inside, Path("outputs/s")) | {"run": run}], [], 1, "x"),
        pytest.raises(ConfigError, match="was not written by a sweep"),
    ):
        Status(Path("outputs/s"))


@pytest.mark.processes
def test_the_table_shows_what_runs_and_what_failed(stub: Make) -> None:
    points = stub(1, 101, 2)
    Pool(1, lambda line: None, gpus=[]).run(points[:2])
    points[2].folder.metrics.write_text('{"step": 4, "seconds": 20.0}\n')
    held = take_lock(points[2].folder.path)
    with announced(Path("outputs/s"), listed(points), [], 1, "finetune sweep x"):
        status = Status(Path("outputs/s"))
        shown = Console(width=120, file=io.StringIO())
        shown.print(table(status, status.states()))
    assert held
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "failed: no data here" in text
    assert "4/10" in text
    assert "2 min" in text  # six steps of 20 s
    assert "1 finished, 1 running, 1 failed of 3" in text


@pytest.mark.processes
def test_on_a_terminal_there_is_a_table_and_elsewhere_lines(
    stub: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = stub(1, 101)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda on=terminal: on)
        with announced(Path("outputs/s"), listed(points), [], 1, "finetune sweep x"), Board() as board:
            board.show(Path("outputs/s"))
            Pool(1, board.say, gpus=[], update=board.update, retry=True).run(points)
        said = capsys.readouterr().err
        assert ("-x: running" in said) is not terminal
        assert "failed (no data here)" in said
        assert ("1 finished, 1 failed of 2" in said) is terminal


@pytest.mark.processes
def test_looking_costs_little(stub: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    points = stub(*range(20))
    Pool(2, lambda line: None, gpus=[]).run(points)
    with announced(Path("outputs/s"), listed(points), [], 1, "finetune sweep x"):
        status = Status(Path("outputs/s"))
        first = status.states()
        monkeypatch.setattr(
            type(points[0].folder), "read_result", None
        )  # a second reading needs no result again
        assert status.states() == first


@pytest.mark.processes
def test_a_run_took_the_time_of_its_own_process(stub: Make) -> None:
    """Its configuration was frozen with all others, before any run was started."""
    points = stub(60, 1)  # five seconds, and a fifth of one
    Pool(1, lambda line: None, gpus=[]).run(points)
    first, second = (duration(point.folder) or 0 for point in points)
    assert first > 4
    assert second < 3


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "?"), (0.4, "0 s"), (89, "89 s"), (100, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert show_seconds(seconds) == words


def test_the_ends_of_sweeps_do_not_hide_each_other(stub: Make) -> None:
    points = stub(1)
    with announced(Path("outputs/s"), listed(points), [], 1, "a"):
        with announced(Path("outputs/s"), listed(points), [], 1, "b"):
            pass
        assert Status(Path("outputs/s")).alive
