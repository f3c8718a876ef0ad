"""Data streams in a configuration: how they are chosen, checked, hashed, shown, swept and repeated."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import load as config
from finetune.errors import ConfigError
from finetune.report.command import make_command
from finetune.report.runs import read_runs

FORGET = ["method=lora", "objective=forget"]
RETAIN = ["streams.retain=jsonl", "streams.retain.path=kept.jsonl"]


def faults(*overrides: str, **where: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.load(list(overrides), **where)
    return caught.value.faults


def test_a_stream_is_a_data_set_with_its_own_settings_and_origins() -> None:
    words = [*FORGET, *RETAIN, "streams.retain.val_share=0.5"]
    found = config.load(words).streams["retain"]
    assert (found.name, found.path, found.val_share) == ("jsonl", "kept.jsonl", 0.5)
    shown = config.tree(words)
    assert shown["streams.retain.name"] == ("jsonl", "conf/dataset/jsonl.yaml:1")
    assert shown["streams.retain.path"] == ("kept.jsonl", "command line")
    assert shown["streams.retain.split_seed"][1].startswith("default in finetune/data/table.py:")
    assert config.tree(["method=lora"])["streams"][0] == {}


def test_the_hash_covers_streams_and_their_absence_is_no_change() -> None:
    hashes = []
    for path in ("a.jsonl", "b.jsonl"):
        hashes.append(config.load([*FORGET, "streams.retain=jsonl", f"streams.retain.path={path}"]).hash())
    assert hashes[0] != hashes[1]
    assert "streams" not in config.load(["method=lora"]).deciding()


def test_a_frozen_configuration_is_read_again(tmp_path: Path) -> None:
    made = config.load([*FORGET, *RETAIN])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(made.as_dict()))
    assert config.load([], None, file) == made
    changed = config.load(["streams.retain.path=moved.jsonl"], None, file)
    assert changed.streams["retain"].path == "moved.jsonl"
    (fault,) = faults("streams.retain=csv", config_file=file)
    assert "streams.retain=csv cannot be combined with --config" in fault


def test_a_sweep_takes_streams_and_their_settings_as_axes() -> None:
    points = config.expand(["streams.retain=jsonl,csv", "streams.retain.path=a,b", "seed=0"])
    assert len(points) == 4
    found = set()
    for point in points:
        retain = config.load([*FORGET, *point]).streams["retain"]
        found.add((retain.name, retain.path))
    assert found == {("jsonl", "a"), ("jsonl", "b"), ("csv", "a"), ("csv", "b")}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (FORGET, "objective=forget needs the data stream retain, and streams.retain is not set."),
        (
            ["method=lora", *RETAIN],
            "streams.retain=jsonl has no effect with objective=task, which uses no data stream.",
        ),
        (
            [*FORGET, *RETAIN, "streams.general=digits"],
            "streams.general=digits has no effect with objective=forget, which uses only retain.",
        ),
        (
            [*FORGET, *RETAIN, "objective.retain=0"],
            "streams.retain=jsonl has no effect with objective=forget, which uses no data stream.",
        ),
        ([*FORGET, *RETAIN, "train.select=best"], "train.select=best keeps the state that is best on val"),
        ([*FORGET, "streams.retain=jsonl"], "streams.retain.path is not set"),
        ([*FORGET, "streams.retain.path=a"], "streams.retain has settings and no data set. Choose one by"),
        ([*FORGET, "streams.retain=jsnl"], "streams.retain=jsnl is not an option"),
        ([*FORGET, "streams.retain={name:jsonl}"], "streams.retain takes exactly one option"),
        ([*FORGET, "streams.retain=jsonl,csv"], "names several values; one run takes one"),
        ([*FORGET, *RETAIN, "streams.retain.name=csv"], "the name follows from the choice"),
        ([*FORGET, *RETAIN, "streams.retain.pth=a"], "Did you mean 'streams.retain.path'?"),
        ([*FORGET, *RETAIN, "streams.retain.val_share=2"], "streams.retain.val_share=2 (command line)"),
        (
            [*FORGET, "streams=jsonl"],
            "should be a mapping. Choose a data set for each by streams.NAME=OPTION",
        ),
    ],
)
def test_bad_input_is_named_with_its_cure(words: list[str], wanted: str) -> None:
    (fault,) = faults(*words)
    assert wanted in fault


def test_faults_of_streams_come_with_all_others() -> None:
    found = faults(*FORGET, "streams.retain.path=a", "train.steps=0", "streams.b=jsonl", "dataset.x=1")
    assert len(found) == 4


def test_the_command_of_a_comparison_repeats_the_streams(tmp_path: Path) -> None:
    words = [*FORGET, *RETAIN, "streams.retain.val_share=0.5", "name=t", "run=r"]
    made = config.load(words)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(made.as_dict()))
    (tmp_path / "result.json").write_text(json.dumps({"format": 1, "status": "finished"}))

    def defaults(choices: Any) -> dict[str, Any]:
        return {key: value for key, (value, _) in config.tree(list(choices)).items()}

    command = make_command(read_runs([tmp_path]), defaults)
    repeated = config.load(shlex.split(command)[2:])
    assert repeated.deciding() == made.deciding()
    assert "streams.retain=jsonl streams.retain.path=kept.jsonl" in command
    assert "split_seed" not in command
