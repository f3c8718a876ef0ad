"""Settings that came later.

An old configuration is read with what their absence means, never with a new default.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import later
from finetune.config.load import load, tree
from finetune.errors import ConfigError
from finetune.launch import resume
from finetune.report import runs as report
from finetune.storage.frozen_config import describe_differences
from finetune.storage.run_folder import RunFolder
from finetune.training import run

FROZEN = Path(__file__).parents[1] / "frozen" / "runs"
SM3 = {
    "name": "sm3",
    "lr": 0.5,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999],
    "eps": 1e-6,
    "schedule": "linear",
    "warmup": 0.0,
}
# A key of LATER, the dotted key in the configuration, the value of its absence (the class's default
# is another).
CASES = {
    "a section": ("optimizer", "optimizer", SM3),
    "a setting": ("train.clip", "train.clip", None),
    "a setting of a nested choice": ("method.schedule[drop_grow].dropped", "method.schedule.dropped", "kept"),
    "a setting of one method": ("method[spiel].window", "method.window", 2),
}


def part(tree: dict[str, Any], key: str) -> Any:
    for step in key.split("."):
        tree = tree[step]
    return tree


def remove(tree: dict[str, Any], key: str) -> dict[str, Any]:
    *parents, name = key.split(".")
    for step in parents:
        tree = tree[step]
    del tree[name]
    return tree


def hash_of(tree: dict[str, Any]) -> str:
    """The hash as it was defined before the setting came.

    It covers the whole tree but for what cannot change the result.
    """
    kept = {key: value for key, value in tree.items() if key not in ("name", "run", "logger")}
    kept["train"] = {k: v for k, v in tree["train"].items() if k not in ("save_every", "keep_last")}
    kept["train"].pop("patience", None)  # which has come later, and is null here
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]


@pytest.fixture(params=CASES)
def old(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str, Any]:
    """A run folder of before a setting came: its configuration and that of its change lack it."""
    entry, key, value = CASES[request.param]
    monkeypatch.setitem(later.LATER, entry, value)
    folder = tmp_path / "run"
    shutil.copytree(FROZEN / "spiel", folder)
    header, _, text = (folder / "config.yaml").read_text().partition("\n")
    config = yaml.safe_load(text)
    remove(config, key)
    (folder / "config.yaml").write_text(f"{header}\n{yaml.safe_dump(config, sort_keys=False)}")
    about = json.loads((folder / "delta/delta.json").read_text())
    remove(about["config"], key)
    (folder / "delta/delta.json").write_text(json.dumps(about))
    return folder, key, value


def test_an_old_configuration_has_the_value_of_the_absence(old: tuple[Path, str, Any]) -> None:
    folder, key, value = old
    config = load([], None, folder / "config.yaml")
    assert part(config.as_dict(), key) == value
    assert part(load(["method=spiel"]).as_dict(), key) != value


def test_it_keeps_its_hash_and_another_value_does_not(old: tuple[Path, str, Any]) -> None:
    folder, key, _ = old
    file = folder / "config.yaml"
    config = load([], None, file)
    assert config.hash() == hash_of(yaml.safe_load(file.read_text()))
    change = {"optimizer": "optimizer.lr=0.25", "train.clip": "train.clip=2"}
    change |= {"method.schedule.dropped": "schedule.dropped=base", "method.window": "method.window=1"}
    assert load([change[key]], None, file).hash() != config.hash()


def test_it_can_be_resumed_and_belongs_to_its_change(old: tuple[Path, str, Any]) -> None:
    folder, key, _ = old
    files = RunFolder(folder)
    config = resume.frozen(folder, [])
    files.check(config)
    files.check_unaltered(json.loads((folder / "delta/delta.json").read_text())["config"], folder)
    frozen = yaml.safe_load((FROZEN / "spiel/config.yaml").read_text())
    frozen.pop("seed")
    with pytest.raises(ConfigError, match="seed is 3 there and absent here"):
        files.check_unaltered(frozen, folder)
    said = describe_differences(files.config, yaml.safe_load((FROZEN / "spiel/config.yaml").read_text()))
    assert said.startswith(key)  # the value of before is another than that of the absence


def test_show_says_where_the_value_came_from(old: tuple[Path, str, Any]) -> None:
    folder, key, _ = old
    file = folder / "config.yaml"
    shown = tree([], None, file)
    found = {origin for name, (_, origin) in shown.items() if f"{name}.".startswith(f"{key}.")}
    assert found == {f"not in {file}, so as before the setting came"}


def test_a_report_compares_old_and_new_runs_by_it(old: tuple[Path, str, Any]) -> None:
    folder, key, value = old
    settings, _ = report._read_config(folder)
    shown = {name: found for name, found in settings.items() if f"{name}.".startswith(f"{key}.")}
    assert shown == ({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})


def test_an_old_run_resumes_with_the_value_that_stands_for_a_missing_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded run selected the last step; by today's default it would select the best."""
    monkeypatch.setitem(later.LATER, "train.select", "last")
    for name in ("model", "lora"):
        shutil.copytree(FROZEN / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    files = RunFolder(Path("lora"))
    recorded = files.read_result()
    files.result.unlink()
    text = files.config.read_text()
    assert "  select: last\n" in text
    files.config.write_text(text.replace("  select: last\n", ""))
    config = load([], None, files.config)
    assert config.train.select == "last"
    assert config.hash() != recorded["config_hash"]  # the recorded one covers train.select
    result = run.train(config, files.path, lambda line: None, lambda done, steps, words: None)
    for key in ("steps", "best_step"):
        assert result[key] == recorded[key] == 8


def test_a_limit_to_classes_leaves_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "LATER", {"method[lora,snell].rank": 3, "method.schedule[ramp].every": 5})
    for method, filled in (
        ({"name": "lora"}, {"name": "lora", "rank": 3}),
        ({"name": "bitfit"}, {"name": "bitfit"}),
        ({"name": "id3", "schedule": {"name": "grow"}}, {"name": "id3", "schedule": {"name": "grow"}}),
        (
            {"name": "sparse", "schedule": {"name": "ramp"}},
            {"name": "sparse", "schedule": {"name": "ramp", "every": 5}},
        ),
    ):
        before = json.dumps(method)
        assert later.enter({"method": method}) == {"method": filled}
        assert later.without({"method": filled}) == {"method": method}
        assert json.dumps(method) == before
    assert later.enter({"method": "text"}) == {"method": "text"}
    assert later.enter({"method": {"name": "lora", "rank": 9}}) == {"method": {"name": "lora", "rank": 9}}


def test_a_section_is_left_out_whole_with_its_own_later_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section that came later, and a setting in it that came later still."""
    monkeypatch.setattr(later, "LATER", {"goal": {"name": "task"}, "goal[task].smooth": 0.0})
    assert later.enter({}) == {"goal": {"name": "task", "smooth": 0.0}}
    assert later.without({"goal": {"name": "task", "smooth": 0.0}}) == {}
    assert later.without({"goal": {"name": "task", "smooth": 0.1}}) == {
        "goal": {"name": "task", "smooth": 0.1}
    }


def test_a_missing_section_gets_its_own_later_settings_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the default of a setting inside a section that came later would reach an old run."""
    entries = [("goal.smooth", 0.5), ("goal", {"name": "task"})]
    for ordered in (entries, entries[::-1]):
        monkeypatch.setattr(later, "LATER", dict(ordered))
        filled = later.enter({"seed": 0})
        assert filled == {"seed": 0, "goal": {"name": "task", "smooth": 0.5}}
        assert later.without(filled) == {"seed": 0}


def test_a_new_run_has_the_defaults_and_not_the_absences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(later.LATER, "train.clip", None)
    assert load([]).train.clip == 1.0
