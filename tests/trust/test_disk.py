"""Disks that are full, read-only or gone, and clocks that go backwards.

One line says so, what was saved stays whole, and the run ends undisturbed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune.cli import app as cli
from finetune.config.load import load
from finetune.errors import ConfigError, FinetuneError, RunFailed
from finetune.storage import lock, manifest
from finetune.storage.run_folder import RunFolder
from finetune.training import run

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "fixtures" / "format-1" / "model"
SMALL = [
    "model=hf",
    f"model.path={MODEL}",
    "method=lora",
    "method.rank=2",
    "train.steps=6",
    "train.batch_size=8",
    "train.eval_every=2",
    "train.save_every=2",
    "train.device=cpu",
    "train.threads=1",
    "optimizer.lr=0.02",
]
Then = Callable[[], object]


def go(folder: Path, *more: str, at: int = -1, then: Then = lambda: None) -> dict[str, Any]:
    """Train in ``folder``; once ``at`` steps are done, ``then`` happens."""
    words = {
        word.partition("=")[0]: word
        for word in (*SMALL, f"name={folder.parent.name}", f"run={folder.name}", *more)
    }
    config = load(list(words.values()))
    return run.train(
        config, folder, lambda line: None, lambda done, steps, words: then() if done == at else None
    )


def outcome(folder: Path) -> list[Any]:
    """All that a run gives, but for times."""
    files = RunFolder(folder)
    lines = (
        [json.loads(line) for line in files.metrics.read_text().splitlines()]
        if files.metrics.exists()
        else []
    )
    numbers = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    result = {key: files.read_result()[key] for key in ("status", "metrics", "params", "steps", "best_step")}
    return [
        result,
        numbers,
        pq.read_table(files.predictions).to_pylist(),
        (files.delta / "delta.safetensors").read_bytes(),
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    go(folder)
    return outcome(folder)


def saved(folder: Path) -> list[int]:
    """The steps of the checkpoints, all of which are whole; and nothing half written lies about."""
    files = RunFolder(folder)
    assert [fault for step in files.steps() for fault in manifest.faults(files.checkpoint(step))] == []
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
    assert not files.delta.exists() or manifest.faults(files.delta) == []
    return files.steps()


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")


@contextmanager
def mounted(place: Path, *words: str) -> Iterator[None]:
    mount(*words, str(place))
    try:
        yield
    finally:
        subprocess.run(
            ["umount", "--lazy", str(place)], check=True
        )  # tensors that are no longer used may still map a file


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("kib", [0, 4, 24, 36, 60, 84, 104, 124])
def test_a_full_disk_ends_a_run_in_one_line_and_with_room_it_resumes(
    tmp_path: Path, undisturbed: list[Any], kib: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(2**21 - 1024 * kib))
        folder = disk / "outputs" / "run"
        with pytest.raises(FinetuneError, match="No space left on device") as caught:
            go(folder)
        words = str(caught.value)
        print(f"{kib} KiB: checkpoints {saved(folder) if folder.exists() else []}; {words}")
        assert "\n" not in words
        assert caught.type is ConfigError or f"finetune train --resume {folder}" in words
        assert not RunFolder(folder).result.exists()
        ballast.unlink()
        go(folder)
        assert outcome(folder) == undisturbed
        saved(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts folders on themselves")
def test_a_folder_that_becomes_read_only_ends_a_run_in_one_line(
    tmp_path: Path, undisturbed: list[Any]
) -> None:
    folder = tmp_path / "outputs" / "run"

    def protect() -> None:
        mount("--bind", str(folder), str(folder))
        mount("-o", "remount,bind,ro", str(folder))

    with pytest.raises(
        RunFailed,
        match=rf"{folder} cannot be written: Read-only file system.* "
        rf"`finetune train --resume {folder}` resumes",
    ):
        go(folder, at=3, then=protect)
    try:
        with pytest.raises(
            ConfigError, match=f"The run folder {folder} cannot be written: Read-only file system"
        ):
            go(folder)
        assert saved(folder) == [2]
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    go(folder)
    assert outcome(folder) == undisturbed


@pytest.mark.parametrize(("logger", "at"), [("jsonl", 3), ("none", 1), ("none", 6)])
def test_a_folder_that_vanishes_is_not_made_again(tmp_path: Path, logger: str, at: int) -> None:
    folder = tmp_path / "outputs" / "run"
    with pytest.raises(RunFailed, match=f"{folder} has vanished during its run"):
        go(folder, f"logger={logger}", at=at, then=lambda: shutil.rmtree(folder))
    assert not RunFolder(folder).result.exists()
    assert not RunFolder(folder).delta.exists()


def test_a_folder_moved_away_and_back_resumes(tmp_path: Path, undisturbed: list[Any]) -> None:
    folder, away = tmp_path / "outputs" / "run", tmp_path / "away"
    with pytest.raises(RunFailed, match="has vanished"):
        go(folder, at=3, then=lambda: folder.rename(away))
    assert not folder.exists()
    away.rename(folder)
    assert saved(folder) == [2]
    go(folder)
    assert outcome(folder) == undisturbed


@pytest.mark.processes
def test_a_run_in_use_is_refused_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/t/r")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        "from finetune.storage.lock import holding_lock\n"
        + (f"with holding_lock(Path({str(folder)!r})): print('held', flush=True); sys.stdin.read()")
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as live:
        assert live.stdout
        live.stdout.readline()
        before = {path: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.setattr(sys, "argv", ["finetune", "train", *SMALL, "name=t", "run=r"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        live.communicate()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"Error: outputs/t/r is in use by process {live.pid} on " in said
    assert "Traceback" not in said
    assert before == {path: content for path, content in before.items() if path.name == ".lock"}


def test_a_clock_that_goes_backwards_decides_nothing(
    tmp_path: Path, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outputs" / "run"
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))

    class Ended(Exception):
        pass

    def end() -> None:
        raise Ended

    with pytest.raises(Ended):
        go(folder, at=5, then=end)
    for i, step in enumerate(saved(folder)):
        for path in (RunFolder(folder).checkpoint(step), *RunFolder(folder).checkpoint(step).iterdir()):
            os.utime(path, (10**8 - i, 10**8 - i))
    assert saved(folder) == [2, 4]
    (folder / ".lock").write_text(json.dumps({"pid": 4194305, "host": "elsewhere", "started": 10**12}))
    monkeypatch.setattr(lock, "_file_system", lambda place: "ext4")
    said: list[str] = []
    config = load([*SMALL, "name=outputs", "run=run"])
    run.train(config, folder, said.append, lambda done, steps, words: None)
    assert "Resuming from step 4" in said[-1]
    assert outcome(folder) == undisturbed


def test_only_the_last_checkpoints_stay_and_that_of_a_failure(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    seen = list[list[int]]()
    go(
        folder,
        "train.save_every=1",
        "train.keep_last=3",
        at=4,
        then=lambda: seen.append(RunFolder(folder).steps()),
    )
    assert seen == [[1, 2, 3]]  # progress is told before the step is saved
    assert saved(folder) == [4, 5, 6]
    (folder / "failure.json").write_text('{"checkpoint": "step-4"}')
    RunFolder(folder).result.unlink()
    shutil.rmtree(RunFolder(folder).checkpoint(6))
    go(folder, "train.save_every=1", "train.keep_last=1")
    assert saved(folder) == [4, 6]
    every = tmp_path / "outputs" / "every"
    go(every, "train.save_every=1", "train.keep_last=null")
    assert saved(every) == [1, 2, 3, 4, 5, 6]
