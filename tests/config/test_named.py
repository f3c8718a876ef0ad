"""Options of groups outside a run's configuration: their YAML files, presets, plug-ins, and faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from finetune import registry
from finetune.config import plugins
from finetune.config.load import conf_dir
from finetune.config.named import read_named
from finetune.errors import ConfigError
from finetune.passes.magnitude import Magnitude

from ..support.plugin import FROM_SKELETONS, write_skeletons

NAMED_IN_FOLDERS = ("structure",)  # these kinds have no settings that a command could read
KINDS = [
    name for name in registry.outside_runs() if registry.KINDS[name].folders and name not in NAMED_IN_FOLDERS
]


@pytest.fixture(autouse=True)
def _no_plugins_stay() -> Iterator[None]:
    yield
    plugins.unload()


def read(folder: Path | None, *words: str) -> Any:
    return read_named("pass", "method", list(words), folder)


def fault(folder: Path | None, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, *words)
    assert len(caught.value.faults) == 1, caught.value.faults
    return caught.value.faults[0]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the user's groups, with two presets and a file in the place of a built-in one."""
    (tmp_path / "pass").mkdir()
    texts = {
        "light": "name: magnitude\nsparsity: 0.3\n",
        "queries": "defaults:\n  - light\n  - _self_\ntargets: [q]\n",
        "wanda": "name: wanda\ninputs: original\n",
        "same": "name: magnitude\nsparsity: 0.2\nscope: row\ntargets: ['${pass.scope}']\n",
    }
    for name, text in texts.items():
        (tmp_path / "pass" / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_class_has_a_file_of_its_name(kind: str) -> None:
    """It names the class and leaves the defaults to it."""
    assert {file.stem for file in (conf_dir() / kind).glob("*.yaml")} >= registry.catalog(kind).keys()
    for name in registry.catalog(kind):
        made = read_named(kind, "key", [f"key={name}"])
        assert made.name == name
        for item in fields(made):
            if item.default is not MISSING:
                assert getattr(made, item.name) == item.default, f"{kind}={name}: {item.name}"


def test_presets_and_files_of_the_users_own(own: Path) -> None:
    assert read(own, "method=light") == Magnitude(sparsity=0.3)
    assert read(own, "method=light", "sparsity=0.4", "method.scope=row") == Magnitude(
        sparsity=0.4, scope="row"
    )
    assert read(own, "method=queries") == Magnitude(sparsity=0.3, targets=("q",))
    assert read(own, "method=wanda", "sparsity=0.5").inputs == "original"
    assert read(None, "method=wanda", "sparsity=0.5").inputs == "processed"
    assert read(own, "method=same").targets == ("row",)


@pytest.mark.parametrize("text", ["targets=q,v", "targets=[q,v]", "method.targets=q,v"])
def test_a_list_needs_no_brackets(text: str) -> None:
    assert read(None, "method=magnitude", text).targets == ("q", "v")
    assert read(None, "method=magnitude", text.replace(",v", "")).targets[0] == "q"


def test_classes_and_presets_of_a_plug_in(tmp_path: Path) -> None:
    folder = write_skeletons(tmp_path / "more")
    (folder / "conf/pass/tinier.yaml").write_text(f"name: {FROM_SKELETONS['pass']}\ntiny: 0.001\n")
    plugins.load([folder])
    assert read(None, f"method={FROM_SKELETONS['pass']}").tiny == 0.01
    assert read(None, "method=tinier").tiny == 0.001
    assert read_named("analysis", "what", [f"what={FROM_SKELETONS['analysis']}"]).order == 2


def test_a_class_of_a_plug_in_needs_no_file(tmp_path: Path) -> None:
    folder = write_skeletons(tmp_path / "more")
    name = FROM_SKELETONS["pass"]
    (folder / "conf" / "pass" / f"{name}.yaml").unlink()
    plugins.load([folder])
    assert read(None, f"method={name}", "tiny=0.5").tiny == 0.5
    assert f", {name}, " in fault(None, "method=wand")


def test_a_plug_in_replaces_no_file(tmp_path: Path) -> None:
    folder = write_skeletons(tmp_path / "more")
    (folder / "conf/pass/wanda.yaml").write_text("name: magnitude\n")
    plugins.load([folder])
    assert "only --config-dir replaces built-in files" in fault(None, "method=wanda")


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("name: magnitude\nsparsity: 2\n", [], r"method.sparsity=2 ({file}:2) should be less than 1."),
        ("name: magnitude\nspars: 1\n", [], r"method.spars=1 ({file}:2) is not an option of method=mine."),
        ("sparsity: 0.5\n", [], "method.name is not set."),
        ("name: magnitud\n", [], "pass=magnitud is not known. Did you mean 'magnitude'?"),
        ("name: 3\n", [], "method.name is not set."),
        ("# @package _global_\npass:\n  name: magnitude\nseed: 1\n", [], "{file}:4 sets seed, but a file of"),
        ("name: [\n", [], "The YAML files do not fit together"),
        ("- name\n", [], "pass=mine: its file should be a mapping of settings, not ['name']."),
        ("name: ${now:%Y}\n", [], "{file}: ${now:%Y} is not resolved"),
        ("", [], "method.name is not set."),
    ],
)
def test_what_is_wrong_with_a_file(own: Path, text: str, words: list[str], expected: str) -> None:
    file = own / "pass" / "mine.yaml"
    file.write_text(text)
    assert expected.replace("{file}", str(file)) in fault(own, "method=mine", *words)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "there is no such folder" in fault(tmp_path / "no", "method=wanda")


def test_faults_of_the_file_and_of_the_words_come_together(own: Path) -> None:
    (own / "pass" / "mine.yaml").write_text("name: magnitude\nscope: rows\n")
    with pytest.raises(ConfigError) as caught:
        read(own, "method=mine", "sparsity=3", "sparsity=4", "inputs=x", "scope")
    assert len(caught.value.faults) == 5, caught.value.faults
