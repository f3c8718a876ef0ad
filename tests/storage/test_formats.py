"""Check that run folders of format 1 stay readable, and that later formats are refused.

The runs in fixtures/format-1 were made before there were manifests, by finetune 0.1.0 at commit 834c164, on a
ViT of width 8 with random weights: ``finetune train method=shira sparsity=0.5`` (and ``method=lora
method.rank=2``) ``model=hf model.path=model model.name=tiny train.steps=6 train.save_every=4
train.eval_every=2 train.batch_size=8 train.threads=1 train.device=cpu optimizer.lr=0.02 seed=3``.
They are never made anew.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.artifacts import reopen as finished
from finetune.config.load import load
from finetune.errors import ConfigError
from finetune.storage import checkpoint, manifest
from finetune.storage.delta import read_tensors
from finetune.storage.run_folder import RunFolder
from finetune.system.safe import FORMAT, explain_newer_format
from finetune.training import run

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format-1"
RUNS = ["shira", "lora"]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an old run once more with this version."""
    folder = tmp_path_factory.mktemp("new")
    shutil.copytree(FIXTURES / "model", folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(Path("shira"), FIXTURES / "shira" / "config.yaml", "train.save_every=2")
    return folder


def train(folder: Path, config: Path, *more: str) -> list[str]:
    """Train; return the messages."""
    said: list[str] = []
    run.train(load(list(more), None, config), folder, said.append, lambda done, steps, words: None)
    return said


def resume_run(files: RunFolder) -> list[str]:
    """Resume from the checkpoint as if the run had been killed; return the messages."""
    files.result.unlink()
    return train(files.path, files.config)


def close(found: Any, told: Any) -> bool:
    """Compare nested numbers, with room for the rounding of another processor."""
    if isinstance(told, dict):
        return found.keys() == told.keys() and all(close(found[key], told[key]) for key in told)
    return bool(found == pytest.approx(told, rel=1e-4))


def test_the_fixture_is_of_the_first_format() -> None:
    assert sorted(path.name for path in FIXTURES.iterdir()) == ["lora", "model", "shira"]
    for name in RUNS:
        assert not list((FIXTURES / name).rglob("manifest.json"))
        assert "format" not in json.loads((FIXTURES / name / "checkpoints/step-4/state.json").read_text())
        assert "keep_last" not in (FIXTURES / name / "config.yaml").read_text()


@pytest.mark.parametrize(("was", "then"), [("alpha: 16.0", "alpha: 8.0"), ("seed: 3", "seed: 4")])
def test_an_altered_configuration_is_named_and_not_used(old: Path, was: str, then: str) -> None:
    config = RunFolder(old / "lora").config
    assert was in config.read_text()
    config.write_text(config.read_text().replace(was, then))
    key, value = then.split(": ")
    with pytest.raises(
        ConfigError,
        match=(
            rf"config.yaml is not what .*delta was trained with: \S*{key} is {value} there "
            rf"and {was.split(': ')[1]} here"
        ),
    ):
        finished.evaluate(Path("lora"))


def test_what_a_run_reads_may_have_been_moved(old: Path) -> None:
    (old / "model").rename(old / "elsewhere")
    config = RunFolder(old / "lora").config
    config.write_text(config.read_text().replace("path: model", "path: elsewhere"))
    assert finished.evaluate(Path("lora"))["metrics"]["test"]


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_evaluates_to_what_it_recorded(old: Path, name: str) -> None:
    told = json.loads((old / name / "result.json").read_text())
    found = finished.evaluate(Path(name))["metrics"]
    assert close(found, {split: told["metrics"][split] for split in ("val", "test", "retention")})
    assert RunFolder(old / name).read_result() == told


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_resumes_to_its_recorded_result(old: Path, name: str) -> None:
    files = RunFolder(Path(name))
    told, lines = files.read_result(), files.metrics.read_text().splitlines()
    before = read_tensors(files.delta / "delta.safetensors")
    said = resume_run(files)
    assert "Resuming from step 4" in said[-1]
    result = files.read_result()
    assert close(result["metrics"], told["metrics"])
    assert [result[key] for key in ("steps", "best_step", "params")] == [
        told[key] for key in ("steps", "best_step", "params")
    ]
    assert result["config_hash"] != told["config_hash"]  # it no longer counts how often a run is saved
    after = read_tensors(files.delta / "delta.safetensors")
    assert after.keys() == before.keys()
    assert all(after[key].allclose(before[key], rtol=1e-3, atol=1e-5) for key in before)
    numbers: list[list[dict[str, Any]]] = []
    for each in (files.metrics.read_text().splitlines(), lines):
        numbers.append([])
        for line in each:
            kept = {k: v for k, v in json.loads(line).items() if k in ("step", "loss", "lr", "val_loss")}
            numbers[-1].append(kept)
    assert len(numbers[0]) == len(numbers[1])
    assert all(close(found, known) for found, known in zip(*numbers, strict=True))


def test_what_is_written_now_says_its_format_and_who_wrote_it(new: Path) -> None:
    found = {str(file.relative_to(new / "shira")) for file in (new / "shira").rglob("*.json")}
    assert found >= {
        "delta/delta.json",
        "delta/manifest.json",
        "result.json",
        "checkpoints/step-6/state.json",
        "checkpoints/step-6/manifest.json",
    }
    for name in found:
        content = json.loads((new / "shira" / name).read_text())
        assert content["format"] == FORMAT, name
        assert content.get("finetune", content.get("versions", {}).get("finetune")) == "0.1.0", name


@pytest.mark.parametrize(
    "name",
    [
        "result.json",
        "delta/delta.json",
        "delta/manifest.json",
        "checkpoints/step-6/state.json",
        "checkpoints/step-6/manifest.json",
    ],
)
def test_a_later_format_is_refused_with_the_version_it_needs(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(new, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    files = RunFolder(Path("shira"))
    content = json.loads((files.path / name).read_text())
    later = {"versions": {"finetune": "7.2.1"}} if name == "result.json" else {"finetune": "7.2.1"}
    (files.path / name).write_text(json.dumps({**content, **later, "format": FORMAT + 2}))
    if not name.endswith("manifest.json") and name != "result.json":
        manifest.write((files.path / name).parent)  # as the later version would have
    before = {file: file.read_bytes() for file in files.path.rglob("*") if file.is_file()}
    words = (
        rf"{name} has format 3, and this version of finetune \(0\.1\.0\) reads up to 1; "
        r"install finetune-bench>=7\.2\.1\."
    )
    with pytest.raises(ConfigError, match=words):
        files.read_result() if name == "result.json" else finished.evaluate((files.path / name).parent)
    if name.startswith("checkpoints"):
        with pytest.raises(ConfigError, match=words):
            checkpoint.find_newest(files, pytest.fail)
    assert {file: file.read_bytes() for file in files.path.rglob("*") if file.is_file()} == before


def test_a_later_configuration_is_refused_with_the_version_it_needs(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(new, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    file = Path("shira/config.yaml")
    settings, text = load([], config_file=file), file.read_text()
    assert text.startswith(f"# format {FORMAT}, finetune 0.1.0\n")
    file.write_text(
        text.replace(f"# format {FORMAT}, finetune 0.1.0", f"# format {FORMAT + 1}, finetune 7.2.1")
    )
    for work in (lambda: load([], config_file=file), lambda: RunFolder(file.parent).check(settings)):
        with pytest.raises(
            ConfigError, match=r"config.yaml has format 2, .*install finetune-bench>=7\.2\.1\."
        ):
            work()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": 1}, ""),
        ({}, ""),
        ([], ""),
        ({"format": 0}, ""),
        ({"format": 2}, "has format 2.*install a newer finetune-bench"),
        ({"format": "1"}, "has format 1"),
        ({"format": True}, "has format True"),
        ({"format": None}, "has format None"),
        ({"format": 2, "finetune": "2.0.0rc1"}, "install finetune-bench>=2.0.0rc1"),
        ({"format": 2, "finetune": "1; rm -rf /"}, "install a newer"),
        ({"format": 2, "versions": {"finetune": "3.1"}}, "install finetune-bench>=3.1"),
        ({"format": 2, "versions": "3"}, "install a newer"),
    ],
)
def test_formats(content: Any, words: str) -> None:
    found = explain_newer_format(Path("x.json"), content)
    assert bool(found) == bool(words)
    assert re.search(words, found)


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(new, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    files = RunFolder(Path("shira"))
    whole = {key: files.read_result()[key] for key in ("metrics", "steps", "best_step")}
    change = (files.delta / "delta.safetensors").read_bytes()
    torn = files.checkpoint(6) / "state.safetensors"
    data = bytearray(torn.read_bytes())
    data[-9] ^= 1
    torn.write_bytes(data)
    for name in ("step-8", "step-07", "step-x"):  # one of a crash, and two that are not ours
        (files.path / "checkpoints" / name).mkdir()
    said = resume_run(files)
    skipped = [line for line in said if "skipped" in line]
    assert ["step-8" in line for line in skipped] == [True, False]
    assert (
        "step-6 is skipped: shira/checkpoints/step-6/state.safetensors is damaged: its SHA-256" in skipped[1]
    )
    assert "Resuming from step 4" in said[-1]
    assert {key: files.read_result()[key] for key in whole} == whole
    assert (files.delta / "delta.safetensors").read_bytes() == change
    assert manifest.faults(files.checkpoint(6)) == []


def test_a_torn_change_is_refused_by_name(new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(new, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "shira" / "delta" / "delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 128  # one bit of one value: nothing but the hash can tell
    file.write_bytes(data)
    with pytest.raises(
        ConfigError,
        match=r"shira/delta/delta\.safetensors is damaged: its SHA-256 is not that of manifest\.json",
    ):
        finished.evaluate(Path("shira"))
    files = RunFolder(Path("shira"))
    told = files.read_result()["metrics"]
    assert [manifest.faults(files.checkpoint(step)) for step in files.steps()] == [[], []]
    resume_run(files)  # the checkpoint brings the change back
    assert finished.evaluate(Path("shira"))["metrics"] == {
        split: told[split] for split in ("val", "test", "retention")
    }
