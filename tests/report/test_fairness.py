"""The fairness check: what it reports, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.report.comparison import compare

from ..support.run_folders import MakeRun

RIGHT = [1, 1, 0, 1, 0]


def findings(tmp_path: Path, **words: Any) -> list[dict[str, Any]]:
    return list(compare([tmp_path / "outputs"], **words).findings)


def test_equal_rows_have_none(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run("lora", seed, RIGHT, method__rank=8)
        make_run("snell", seed, RIGHT, method__sparsity=0.9, logger__name="none")
    assert findings(tmp_path) == []


@pytest.mark.parametrize(
    ("setting", "values", "kind", "shown"),
    [
        ("optimizer__lr", (0.01, 0.1), "setting", ("0.01", "0.1")),
        ("train__batch_size", (16, 32), "data order", ("16", "32")),
        ("train__precision", ("fp32", "bf16"), "precision", ("fp32", "bf16")),
        ("model__dtype", ("float32", "bfloat16"), "precision", ("float32", "bfloat16")),
        ("train__threads", (1, None), "hardware", ("1", "null")),
        ("dataset__length", (128, 64), "setting", ("128", "64")),
        ("dataset__split_seed", (0, 1), "data order", ("0", "1")),
        ("train__eval_batch_size", (100, 50), "setting", ("100", "50")),
    ],
)
def test_settings_that_differ(
    make_run: MakeRun,
    tmp_path: Path,
    setting: str,
    values: tuple[Any, Any],
    kind: str,
    shown: tuple[str, str],
) -> None:
    make_run("lora", 0, RIGHT, **{setting: values[0]})
    make_run("snell", 0, RIGHT, **{setting: values[1]})
    (found,) = findings(tmp_path, by=["method"])
    key = setting.replace("__", ".")
    assert (found["kind"], found["what"], found["values"]) == (
        kind,
        key,
        {"lora": shown[0], "snell": shown[1]},
    )
    assert f"{shown[0]} (lora)" in found["words"]
    assert f"{shown[1]} (snell)" in found["words"]


def test_a_setting_that_only_one_row_has(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, RIGHT, train__extra=1)
    make_run("snell", 0, RIGHT)
    (found,) = findings(tmp_path)
    assert found["values"] == {"lora": "1", "snell": "null"}


def test_compared_settings_and_their_part_are_no_findings(make_run: MakeRun, tmp_path: Path) -> None:
    for rank, method in ((4, "lora"), (8, "bitfit")):  # neither has settings that came later
        for size in (16, 32):
            make_run(method, 0, RIGHT, train__batch_size=size, method__rank=rank)
    assert findings(tmp_path) == []
    (found,) = findings(tmp_path, by=["train.batch_size"]) or [{}]
    assert found == {}  # both methods are in both rows
    (only,) = findings(tmp_path, by=["rank"])
    assert only["what"] == "method.name"


@pytest.mark.parametrize(
    ("counts", "unequal"), [((1000, 1015), False), ((1000, 1030), True), ((0, 0), False), ((0, 5), True)]
)
def test_trained_counts_within_two_percent(
    make_run: MakeRun, tmp_path: Path, counts: tuple[int, int], unequal: bool
) -> None:
    for method, count in zip(("lora", "snell"), counts, strict=True):
        make_run(method, 0, RIGHT, result={"params": {"trained": count, "adapted": 1, "total": 1}})
    found = findings(tmp_path)
    assert [finding["kind"] for finding in found] == (["trained"] if unequal else [])


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.1, 0.101), None),
        ((0.1, 0.118), "differs: 10 % (lora), 11.8 % (snell)."),
        ((0.0, 1.0), "differs: 0 % (lora), 100 % (snell)."),
        ((0.1, None), None),
        ((0.1, "absent"), None),
    ],
)
def test_rows_that_train_as_many_entries_and_change_others(
    make_run: MakeRun, tmp_path: Path, shares: tuple[float, Any], words: str | None
) -> None:
    for method, share in zip(("lora", "snell"), shares, strict=True):
        given = {} if share == "absent" else {"changed": share}
        make_run(method, 0, RIGHT, result={"params": {"trained": 5, "adapted": 9, "total": 9}, **given})
    found = findings(tmp_path)
    if words is None:
        assert found == []
    else:
        assert (found[0]["kind"], found[0]["what"]) == ("trained", "changed entries")
        assert found[0]["words"].endswith(words)


def test_tuning_with_equal_trials_is_fair(make_run: MakeRun, tmp_path: Path) -> None:
    five = {"parameter": "optimizer.lr", "trials": 5}
    make_run("lora", 0, RIGHT, optimizer__lr=0.1, tuning=five)
    make_run("snell", 0, RIGHT, optimizer__lr=0.2, tuning=five)
    assert findings(tmp_path) == []
    make_run("head", 0, RIGHT, optimizer__lr=0.2, tuning={**five, "trials": 40})
    assert {(f["kind"], f["what"]) for f in findings(tmp_path)} == {
        ("setting", "optimizer.lr"),
        ("trials", "tuning trials"),
    }


def test_an_untuned_row_beside_a_tuned_one(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, RIGHT, optimizer__lr=0.1, tuning={"parameter": "optimizer.lr", "trials": 5})
    make_run("snell", 0, RIGHT, optimizer__lr=0.2)
    (rate, trials) = findings(tmp_path)
    assert (rate["what"], trials["values"]) == (
        "optimizer.lr",
        {"lora": "5 trials of optimizer.lr", "snell": "none"},
    )


@pytest.mark.parametrize(
    ("result", "kind", "what"),
    [
        ({"versions": {"finetune": "0.1.0", "torch": "2.12.0"}}, "versions", "torch"),
        ({"versions": {"finetune": "0.1.0"}}, "versions", "torch"),
        ({"git_commit": "b" * 40 + "-dirty"}, "versions", "commit"),
        ({"device": "cuda:0"}, "hardware", "device"),
        ({"threads": 2}, "hardware", "threads"),
        ({"steps": 100}, "setting", "steps done"),
    ],
)
def test_differences_that_results_record(
    make_run: MakeRun, tmp_path: Path, result: dict[str, Any], kind: str, what: str
) -> None:
    make_run("lora", 0, RIGHT)
    make_run("snell", 0, RIGHT, result=result)
    (found,) = findings(tmp_path)
    assert (found["kind"], found["what"]) == (kind, what)
    assert set(found["values"]) == {"lora", "snell"}


def test_memory_measured_in_two_ways(make_run: MakeRun, tmp_path: Path) -> None:
    cost = {
        "step_seconds_median": 1.0,
        "train_seconds": 1.0,
        "peak_memory_bytes": 5,
        "peak_memory_kind": "cuda_allocated",
    }
    make_run("lora", 0, RIGHT)
    make_run("snell", 0, RIGHT, result={"cost": cost})
    (found,) = findings(tmp_path)
    assert found["values"] == {"lora": "process_rss", "snell": "cuda_allocated"}


def test_seeds_weights_and_labels(make_run: MakeRun, tmp_path: Path) -> None:
    one, other = make_run("lora", 0, RIGHT), make_run("snell", 0, RIGHT)
    for folder, mark in ((one, "a" * 64), (other, "b" * 64)):
        (folder / "delta").mkdir()
        (folder / "delta" / "delta.json").write_text(f'{{"base_fingerprint": "{mark}"}}')
    (found,) = findings(tmp_path)
    assert (found["what"], found["values"]) == ("base weights", {"lora": "a" * 10, "snell": "b" * 10})
    make_run("lora", 1, RIGHT)
    assert {(f["kind"], f["what"]) for f in findings(tmp_path)} == {
        ("setting", "base weights"),
        ("seeds", "seeds"),
    }


def test_other_labels_of_the_same_examples(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, RIGHT, ids=["a", "b", "c", "d", "e"])
    make_run("snell", 0, RIGHT, ids=["b", "a", "c", "d", "e"])
    (found,) = findings(tmp_path)
    assert (found["what"], found["values"]) == (
        "test labels",
        {"lora": "0 other labels", "snell": "2 other labels"},
    )


def test_a_teacher_with_other_weights_at_the_same_path(make_run: MakeRun, tmp_path: Path) -> None:
    for method, mark in (("lora", "a" * 64), ("bitfit", "b" * 64)):
        make_run(method, 0, RIGHT, result={"references": {"teacher": mark}})
    (found,) = findings(tmp_path)
    assert found["values"] == {"lora": "a" * 10, "bitfit": "b" * 10}
    assert found["words"].startswith("The teacher teacher had different weights: ")
