"""What starts several processes: what it refuses, and what it tells of how they ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.load import load
from finetune.config.settings import TrainConfig
from finetune.errors import ConfigError, RunFailed
from finetune.launch import ranks as launcher
from finetune.launch.start import NO_OPTIONS
from finetune.system.environment import sharding_faults
from finetune.system.signals import Interrupted
from finetune.training.prepare import make_accelerator, prepare


@pytest.mark.parametrize(
    "name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"]
)
def test_a_sharded_base_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"{name}=true: .* splits the base's weights.*--processes N"):
        prepare(load(["method=lora", "train.device=cpu"]))
    assert not sharding_faults({name: "false"})


def test_what_a_launcher_says_of_accumulation_does_not_divide_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(TrainConfig(device="cpu")).gradient_accumulation_steps == 1


def test_threads_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.training import prepare as setup

    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for threads in (8, 2):
        setup.make_deterministic(TrainConfig(threads=threads))
    assert given == [2, 1]


def words(rank: int, code: int, *lines: str, severed: bool = False, trace: str = "") -> dict[str, Any]:
    return {
        "rank": rank,
        "code": code,
        "lines": list(lines),
        "severed": severed,
        "trace": trace,
        "at": float(rank),
    }


LOST = words(0, 1, "Another process of this run has ended", severed=True)


def test_the_cause_is_reported_and_not_what_followed_from_it() -> None:
    folder = Path("outputs/t/r")
    launcher._raise_cause([0, 0], [], folder)
    with pytest.raises(RunFailed, match="no space") as failed:
        launcher._raise_cause([1, 1], [LOST, words(1, 1, "no space"), words(2, 1, "what came later")], folder)
    assert "Another" not in str(failed.value)
    with pytest.raises(launcher.ProcessFailed, match="process 1 of 2: KeyError: 7") as unexpected:
        launcher._raise_cause([1, 1], [LOST, words(1, 1, "KeyError: 7", trace="the traceback")], folder)
    assert str(unexpected.value.__cause__) == "the traceback"
    with pytest.raises(RunFailed, match=r"Process 1 of 2 was ended by SIGKILL \(out of memory\?\)"):
        launcher._raise_cause([1, -9], [LOST], folder)
    with pytest.raises(RunFailed, match=r"exit codes \[1, 0\]"):
        launcher._raise_cause([1, 0], [], folder)


def test_mistakes_and_signals_are_reported_once() -> None:
    with pytest.raises(ConfigError) as wrong:
        launcher._raise_cause(
            [2, 2],
            [words(1, 2, "a is wrong", "b is wrong"), words(0, 2, "a is wrong", "b is wrong")],
            Path("r"),
        )
    assert wrong.value.faults == ("a is wrong", "b is wrong")
    with pytest.raises(Interrupted) as stopped:
        launcher._raise_cause(
            [130, 130],
            [words(1, 130, "SIGTERM", " after step 3"), words(0, 130, "SIGTERM", " after step 3")],
            Path("r"),
        )
    assert (stopped.value.name, stopped.value.saved) == ("SIGTERM", " after step 3")


def _fails() -> None:
    os._exit(3)


def _hangs() -> None:
    signal.pause()


@pytest.mark.processes
def test_who_does_not_end_by_itself_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.1)
    started = [multiprocessing.get_context("fork").Process(target=target) for target in (_hangs, _fails)]
    for process in started:
        process.start()
    assert launcher._supervise(started) == {0}
    assert [process.exitcode for process in started] == [-signal.SIGKILL, 3]
    assert launcher.GRACE + 1 < 30
    monkeypatch.undo()
    assert launcher.GRACE < 20, "all have ended within 30 s"


def test_no_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"--processes 3, but there are 2 GPUs here. Take fewer, or train.device=cpu."
    ):
        launcher.launch(load([]), tmp_path, 3, NO_OPTIONS)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="Leave one of the two out"):
        launcher.launch(load(["train.device=cpu"]), tmp_path, 2, NO_OPTIONS)


@pytest.mark.parametrize(
    "words",
    [
        "[pair.cc:538] Connection closed by peer [127.0.0.1]:1",
        "NCCL error in: x.cpp:1, remote process exited",
    ],
)
def test_a_lost_connection_is_no_cause(words: str) -> None:
    assert launcher.is_lost_connection(RuntimeError(words))
    assert not launcher.is_lost_connection(ValueError(words))
    assert not launcher.is_lost_connection(RuntimeError("shapes cannot be multiplied"))
