"""Data streams: which examples a step has of them, and data that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.data.encode import Tokens
from finetune.testing import contract
from finetune.training.batches import Batches

from ..support import task
from ..support.command import call

BOTH = ("train", "retain")


def batches(size: int = 19, **changes: Any) -> Batches:
    settings: dict[str, Any] = {"batch_size": 8, "micro_batch_size": None, "seed": 0} | changes
    streams = {"retain": Tokens(contract.examples(n=size, seed=2))}
    made = Batches(Tokens(contract.examples()), **settings, streams=streams)
    made.used = BOTH
    return made


def ids(made: Batches, start: int, end: int) -> list[list[tuple[str, list[str]]]]:
    """Return stream and ids of each micro-batch of each step."""
    found = []
    for step in made.steps(start, end):
        found.append([(batch.stream, batch.ids) for batch in step if batch])
    return found


def of_stream(steps: list[list[tuple[str, list[str]]]], stream: str) -> list[list[str]]:
    """Return the ids of a stream's examples in each step."""
    found = []
    for step in steps:
        names: list[str] = []
        for source, part in step:
            names += part if source == stream else []
        found.append(names)
    return found


def test_an_epoch_has_every_example_of_a_stream_once() -> None:
    steps = of_stream(ids(batches(), 0, 3), "retain")
    assert [len(step) for step in steps] == [8, 8, 3]
    assert sorted([*steps[0], *steps[1], *steps[2]]) == sorted(map(str, range(19)))


def test_any_step_can_be_the_first() -> None:
    whole = ids(batches(), 0, 9)
    assert ids(batches(), 5, 9) == whole[5:]


@pytest.mark.processes
def test_a_process_that_loads_data_changes_nothing() -> None:
    assert ids(batches(workers=1), 5, 7) == ids(batches(), 5, 7)


def test_the_seed_and_the_name_decide_and_the_training_data_keeps_its_order() -> None:
    both = ids(batches(size=21), 0, 3)
    alone = Batches(Tokens(contract.examples()), 8, None, 0)
    assert of_stream(both, "train") == of_stream(ids(alone, 0, 3), "train")
    assert of_stream(both, "retain") != of_stream(both, "train")
    assert of_stream(ids(batches(size=21, seed=1), 0, 3), "retain") != of_stream(both, "retain")


def test_micro_batches_and_ranks_share_out_the_same_examples() -> None:
    whole = of_stream(ids(batches(), 0, 3), "retain")
    shares = []
    for rank in range(2):
        shares.append(of_stream(ids(batches(rank=rank, world=2, micro_batch_size=3), 0, 3), "retain"))
    for step, left, right in zip(whole, *shares, strict=True):
        assert sorted(step) == sorted(left + right)


def test_the_search_for_a_batch_size_stops_at_the_smallest_stream() -> None:
    assert batches(size=5).most == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streams")
    task.make(made)
    (made / "text.jsonl").write_text(12 * (json.dumps({"text": "one two three"}) + "\n"))
    return made


def refused(folder: Path, tmp_path: Path, *words: str) -> str:
    common = [*task_words(folder), "method=lora", "objective=forget", *words]
    said = call("train", *common, folder=tmp_path)
    assert said.code == 2
    assert not (tmp_path / "outputs").exists()
    return said.err


def task_words(folder: Path) -> list[str]:
    model, images = f"model.path={folder / 'model'}", f"dataset.path={folder / 'images'}"
    return ["model=hf", model, "dataset=imagefolder", images, "train.device=cpu"]


def test_a_stream_of_another_task(folder: Path, tmp_path: Path) -> None:
    words = ("streams.retain=jsonl", f"streams.retain.path={folder / 'text.jsonl'}")
    err = refused(folder, tmp_path, *words, "streams.retain.task=causal_lm")
    assert "streams.retain is data for causal_lm, and the data set is for image_classification" in err


def test_a_stream_with_other_labels(folder: Path, tmp_path: Path) -> None:
    words = ("dataset.image_column=null", "streams.retain=digits")
    err = refused(folder, tmp_path, *words)
    assert "streams.retain has the labels 0, 1, 2, 3, 4, ..., and the data set has a, b, c" in err


def test_a_stream_that_cannot_fill_a_batch(folder: Path, tmp_path: Path) -> None:
    words = ("streams.retain=imagefolder", f"streams.retain.path={folder / 'images'}")
    err = refused(folder, tmp_path, *words, "train.batch_size=40")
    assert "streams.retain has 33 training examples, fewer than one batch of train.batch_size=40" in err


def test_a_stream_that_is_not_there_is_named_by_its_own_key(folder: Path, tmp_path: Path) -> None:
    err = refused(folder, tmp_path, "streams.retain=jsonl", "streams.retain.path=gone.jsonl")
    assert "streams.retain: " in err
    assert "streams.retain.path=gone.jsonl" in err


def test_a_finished_run_is_evaluated_without_its_streams(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(folder / "images", kept)
    words = ["method=lora", "objective=forget", "streams.retain=imagefolder", f"streams.retain.path={kept}"]
    made = call("train", *task_words(folder), *words, "train.steps=2", "name=t", "run=r", folder=tmp_path)
    assert made.code == 0, made.err
    result = json.loads((tmp_path / "outputs/t/r/result.json").read_text())
    assert result["streams"] == {"retain": "imagefolder"}
    assert result["best_step"] == 2
    shutil.rmtree(kept)
    evaluated = call("eval", "ckpt=outputs/t/r", "--json", folder=tmp_path)
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["metrics"]["test"] == result["metrics"]["test"]
