"""Find run folders, and read them even if they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from finetune.errors import ConfigError
from finetune.report.comparison import compare
from finetune.report.runs import find_runs, read_runs

from ..support.run_folders import MakeRun

FILES = ["result.json", "config.yaml", "predictions.parquet", "tuning.json", "metrics.jsonl"]


def test_runs_are_found_at_any_depth_and_once(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        make_run("lora", 0),
        make_run("lora", 1),
        make_run("lora", 0, into="other"),
        make_run("lora", 3, status="unfinished"),
    ]
    make_run("head", 0, into="sweep/trials")
    make_run("head", 1, into="sweep/.hidden")
    outputs = tmp_path / "outputs"
    assert sorted(find_runs([outputs])) == sorted(runs)
    assert sorted(find_runs([outputs / "sweep"])) == sorted(set(runs) - {runs[2]})
    assert find_runs([runs[0]]) == [runs[0]]
    assert find_runs([runs[0], outputs / "sweep" / ".." / "sweep" / runs[0].name]) == [runs[0]]


def test_folders_that_hold_no_run_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        find_runs([tmp_path / "empty", tmp_path / "missing", tmp_path / "file"])
    assert [
        "holds no run" in caught.value.faults[0],
        *("no such folder" in fault for fault in caught.value.faults[1:]),
    ] == [True] * 3


def test_two_copies_of_a_run_count_once(make_run: MakeRun) -> None:
    first, second = make_run("lora", 0, [1, 1, 0]), make_run("lora", 0, [1, 1, 0], into="copy")
    (run,) = read_runs([first, second])
    assert run.path == first
    assert run.notes == [f"{second} repeats {first} and is left out."]
    failed = make_run("head", 0, status="failed", into="failed")
    finished = make_run("head", 0, [1, 0])
    (run,) = read_runs([failed, finished])
    assert (run.path, run.status) == (finished, "finished")


def test_status_of_each(make_run: MakeRun) -> None:
    runs = read_runs(
        [
            make_run("lora", 0, [1, 0]),
            make_run("lora", 1, status="failed"),
            make_run("lora", 2, status="unfinished"),
        ]
    )
    assert [(run.status, run.error, run.seed) for run in runs] == [
        ("finished", None, 0),
        ("failed", "out of memory", 1),
        ("unfinished", None, 2),
    ]
    assert runs[0].settings == runs[2].settings
    assert runs[0].get_number("test.accuracy") == 0.5
    assert runs[0].get_number("cost.peak_memory_bytes") == 512 << 20
    assert runs[0].get_number("test.nothing") is runs[0].get_number("versions.torch") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format": 1, "status": "fini', "damaged or cut short"),
        ("[]", "holds no result"),
        ('{"format": 2}', "has format 2, and this version of finetune"),
        ('{"format": "x"}', "has format x"),
        ('{"status": "odd"}', "no reason recorded"),
        ("\x00\xff", "damaged"),
    ],
)
def test_a_damaged_result_is_a_failure_with_its_reason(make_run: MakeRun, content: str, reason: str) -> None:
    folder = make_run("lora", 0)
    (folder / "result.json").write_text(content)
    (run,) = read_runs([folder])
    assert run.status == "failed"
    assert reason in (run.error or "")
    assert run.settings["method.name"] == "lora"


def test_a_damaged_config_is_read_from_the_stored_change_or_is_a_failure(make_run: MakeRun) -> None:
    whole, damaged, lost = (
        make_run("lora", 0),
        make_run("lora", 1, method__rank=4),
        make_run("lora", 2, method__rank=8),
    )
    config = {"seed": 1, "method": {"name": "lora", "rank": 4}}
    (damaged / "delta").mkdir()
    (damaged / "delta" / "delta.json").write_text(json.dumps({"config": config, "base_fingerprint": "abc"}))
    for folder in (damaged, lost):
        (folder / "config.yaml").write_text("method: {name: [")
    runs = read_runs([whole, damaged, lost])
    assert [run.status for run in runs] == ["finished", "finished", "failed"]
    assert (runs[1].settings["method.rank"], runs[1].base_fingerprint) == (4, "abc")
    assert "config.yaml cannot be read" in (runs[2].error or "")
    assert runs[2].settings["method.name"] == "lora"


NAMES = st.sampled_from(["test", "accuracy", "parameter", "trials", "status"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def test_runs_that_a_search_pruned_are_called_pruned(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("lora", 0, [1, 0]), *(make_run("lora", seed, status="unfinished") for seed in (1, 2))]
    trials = [
        {"run": run.name, "status": status}
        for run, status in zip(runs, ("finished", "pruned", "unfinished"), strict=True)
    ]
    (runs[0].parent / "search.json").write_text(
        json.dumps({"trials": [*trials, {"run": None, "status": "failed"}]})
    )
    assert [run.status for run in read_runs(runs)] == ["finished", "pruned", "unfinished"]


KEYS = [
    "metrics",
    "cost",
    "params",
    "versions",
    "seed",
    "group_hash",
    "status",
    "stored_bytes",
    "git_commit",
    "device",
    "format",
]


@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    file=st.sampled_from(FILES),
    cut=st.integers(0, 300),
    noise=st.binary(max_size=8),
    key=st.sampled_from(KEYS),
    value=JSON,
)
def test_no_damage_stops_a_comparison(
    make_run: MakeRun, tmp_path: Path, file: str, cut: int, noise: bytes, key: str, value: object
) -> None:
    """One run is cut short, or has arbitrary values for numbers; the other runs keep their rows."""
    for seed in (0, 1):
        make_run("lora", seed, [1, 0, 1])
        make_run("head", seed, [1, 1, 1])
    folder = make_run("full", 0, [1, 1, 0], tuning={"parameter": "optimizer.lr", "trials": 2})
    (folder / "metrics.jsonl").write_text('{"step": 1, "val_accuracy": 0.5}\n')
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:cut] + noise)
    json.dumps(compare([tmp_path / "outputs"]).as_dict())
    (folder / file).write_bytes(whole)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {key: value}))
    tuning = (
        json.dumps({"parameter": "optimizer.lr", "trials": value}) if key == "seed" else json.dumps(value)
    )
    (folder / "tuning.json").write_text(tuning)
    found = compare([tmp_path / "outputs"]).as_dict()
    assert {"lora", "head"} <= {row["label"] for row in found["rows"] if row["finished"] == 2}
