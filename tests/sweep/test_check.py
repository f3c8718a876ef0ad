"""Faults are found before any run starts. The oracle is ``train``, which refuses with the same message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import sweep
from finetune.errors import ConfigError
from finetune.optim.sm3 import SM3
from finetune.sweep import check, work
from finetune.training import run

CPU = ["train.device=cpu", "train.steps=8"]
FAULTS = {
    "data": ["dataset=imagefolder", "dataset.path=nope,nowhere", "method=lora"],
    "model": ["model=hf", "model.path=nope", "method=lora", "seed=0,1"],
    "targets": ["method=lora,shira", "method.targets=[foo]"],
    "precision": ["method=lora,bitfit", "model.dtype=bfloat16", "train.precision=fp32,bf16,fp16"],
    "task": ["model=tiny_lm,tiny_vit", "dataset=stdlib,digits", "method=lora"],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported everything."""
    monkeypatch.setattr(check, "_faults_in_child", lambda configs, options: check.faults_of(configs))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "task")) for name in FAULTS]
)  # a language model
def test_every_point_that_train_refuses_is_named(name: str) -> None:
    runs = sweep.list_points([*FAULTS[name], *CPU])
    told: dict[str, list[str]] = {}
    for point in runs:
        try:
            run.prepare(point.config)
        except ConfigError as error:
            for fault in error.faults:
                told.setdefault(fault, []).append(point.label)
    assert told
    with pytest.raises(ConfigError) as refused:
        check.check(runs)
    for fault in refused.value.faults:
        words, at, label = fault.partition(" (at ")
        assert label.startswith(told[words][0]) if at else len(told[words]) == len(runs)
    assert len(refused.value.faults) == len(told)
    assert not list(Path().iterdir())


@pytest.mark.usefixtures("here")
def test_an_optimizer_that_refuses_the_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training makes the optimizer only after the method is built, so the check has to do so, too."""

    def refuse(self: SM3, groups: object, states: object) -> None:
        raise ConfigError("optimizer=sm3 does not fit this method.")

    monkeypatch.setattr(SM3, "make", refuse)
    runs = sweep.list_points(["method=bitfit", "optimizer=adamw,sm3", *CPU])
    with pytest.raises(ConfigError) as refused:
        check.check(runs)
    assert refused.value.faults == ("optimizer=sm3 does not fit this method. (at optimizer=sm3)",)
    with pytest.raises(ConfigError, match="sm3 does not fit"):
        run.prepare(runs[1].config)


@pytest.mark.usefixtures("here")
def test_an_unexpected_error_does_not_hide_the_faults_of_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in may raise anything; its run reports it."""

    def fail(self: SM3, groups: object, states: object) -> None:
        raise ValueError("an error of the optimizer's own")

    monkeypatch.setattr(SM3, "make", fail)
    words = ["method=bitfit", "optimizer=sm3,adamw", "model.dtype=float32,bfloat16", *CPU]
    faults = check.faults_of([point.config for point in sweep.list_points(words)])
    assert [bool(found) for found in faults] == [False, True, False, True]


@pytest.mark.usefixtures("here")
def test_what_can_be_run_passes_and_a_fault_does_not_hide_another() -> None:
    good = [
        point
        for method in ("lora", "snella", "lt_sft", "bitfit", "peft")
        for point in sweep.list_points([f"method={method}", *CPU])
    ]
    assert check.faults_of([point.config for point in good]) == [()] * len(good)
    bad, worse = (
        sweep.list_points([f"method={method}", "method.targets=[foo]", *CPU])[0]
        for method in ("lora", "shira")
    )
    assert [bool(faults) for faults in check.faults_of([bad.config, good[0].config, worse.config])] == [
        True,
        False,
        True,
    ]


@pytest.mark.usefixtures("here")
def test_a_sweep_does_so_before_it_writes_anything(
    typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "check", check.check)
    for more in ([], ["tune=optimizer.lr", "--trials", "2"]):
        code, _, err = typed("method=lora,shira", "method.targets=[foo]", "seed=0,1", *CPU, *more)
        assert (code, err.count("Error: method.targets: 'foo'")) == (2, 1), err
        assert not list(Path().iterdir())


@pytest.mark.slow
def test_another_process_looks_and_finished_runs_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = sweep.list_points(["method=lora,shira", "method.targets=[foo]", *CPU])
    with pytest.raises(ConfigError, match="foo"):
        check.check(runs)
    for point in runs:
        point.folder.path.mkdir(parents=True)
        point.folder.result.write_text('{"format": 1, "status": "finished"}')
    failed = runs[1].folder.result
    failed.write_text('{"format": 1, "status": "failed"}')
    with pytest.raises(ConfigError, match=r"foo.*shira"):
        check.check(runs, retry=True)
    monkeypatch.setattr(check, "_faults_in_child", pytest.fail)
    check.check(runs)
