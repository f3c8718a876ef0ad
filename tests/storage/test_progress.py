"""The progress record in a checkpoint: written as format 1 has it, and read strictly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.storage.progress import BatchRecord, ProgressRecord, WatchRecord, read_progress

TESTS = Path(__file__).parents[1]
FROZEN = sorted((TESTS / "frozen" / "runs").glob("*/checkpoints/step-*/state.json"))
FIRST = sorted((TESTS / "fixtures" / "format-1").glob("*/checkpoints/step-*/state.json"))
FOLDER = Path("step-4")


def read_extra(file: Path) -> dict[str, Any]:
    extra: dict[str, Any] = json.loads(file.read_text())["extra"]
    return extra


@pytest.mark.parametrize("file", FROZEN, ids=lambda file: file.parents[2].name)
def test_a_record_is_written_as_an_earlier_version_wrote_it(file: Path) -> None:
    """Compare with the files of the frozen runs: the same keys in the same order, the same values."""
    extra = read_extra(file)
    assert json.dumps(read_progress(FOLDER, extra).to_json()) == json.dumps(extra)


@pytest.mark.parametrize("file", FIRST, ids=lambda file: file.parents[2].name)
def test_what_the_first_checkpoints_lack_comes_from_the_new_run(file: Path) -> None:
    extra = read_extra(file)
    lacking = {"spent", "over", "watch", "memory", "threads", "processes", "config"}
    assert not lacking & extra.keys()
    current = ProgressRecord(threads=3, processes=2, config={"seed": 3})
    record = read_progress(FOLDER, extra, current)
    assert (record.threads, record.processes, record.config) == (3, 2, {"seed": 3})
    assert (record.watch, record.memory, record.over) == (WatchRecord(), None, False)
    assert record.seconds == extra["seconds"]
    assert record.best == [float(number) for number in extra["best"]]


def test_a_record_of_everything_comes_back_equal() -> None:
    record = ProgressRecord(
        best=[math.nan, -math.inf],
        best_step=4,
        best_stage=[1, 0],
        val={"loss": 1.5, "accuracy": None},
        base_retention={"loss": 2.0},
        seconds=[0.5, 0.25],
        spent=3.0,
        over=True,
        watch=WatchRecord(1, 7, 2.5, [0.1], [0.2], 3, {"a": 2**62}, ["loss"], ["The loss rose."]),
        memory=BatchRecord(8, 2, [{"step": 1, "from": 8, "to": 2}]),
        threads=5,
        processes=2,
        config={"seed": 3},
        plugins=[{"name": "mine", "version": "", "sha256": "a" * 64}],
    )
    text = json.dumps(record.to_json() | {"of a later version": 1}).replace("NaN", "null")
    back = read_progress(FOLDER, json.loads(text))
    assert back.best is not None
    assert math.isnan(back.best[0])
    record.best, back.best = record.best and record.best[1:], back.best[1:]
    assert back == record


WRONG = {
    "no seconds": ({"seconds": ...}, "it has no seconds"),
    "seconds of text": ({"seconds": ["1"]}, r"seconds\[0\] should be a float"),
    "infinite": ({"spent": math.inf}, "spent should be a float"),
    "a flag of 1": ({"over": 1}, "over should be a bool"),
    "best of lists": ({"best": [[1.0]]}, r"best\[0\] should be a"),
    "best of words": ({"best": ["high"]}, "could not convert"),
    "no best, but its step": ({"best": None}, "some are null and some are not"),
    "watch without losses": ({"watch": {"phase": 0}}, "watch has no seen"),
    "a checksum of text": (
        {"watch": {**vars(WatchRecord()), "still": {"a": "b"}}},
        "watch.still should be",
    ),
    "no size": ({"memory": {"micro_batch_size": 1, "out_of_memory": []}}, "memory should be"),
    "a batch of 0": ({"memory": vars(BatchRecord(0))}, "batch_size is 0"),
    "a halving without a size": (
        {"memory": {**vars(BatchRecord(8)), "out_of_memory": [{"step": 1, "from": 8}]}},
        "memory should be",
    ),
    "a million threads": ({"threads": 10**6}, "threads is 1000000"),
    "no process": ({"processes": 0}, "processes is 0"),
    "a plug-in without a digest": (
        {"plugins": [{"name": "mine", "version": ""}]},
        r"plugins\[0\] has no sha256",
    ),
    "settings of a list": ({"config": []}, "config should be a mapping"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_is_named(name: str) -> None:
    change, words = WRONG[name]
    extra = ProgressRecord(best=[1.0], best_step=1, best_stage=[0, 1]).to_json()
    for key, value in change.items():
        if value is ...:
            del extra[key]
        else:
            extra[key] = value
    with pytest.raises(
        ConfigError, match=f"step-4/state.json is not a state of a run .*{words}.*another checkpoint"
    ):
        read_progress(FOLDER, extra)
