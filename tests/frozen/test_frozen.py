"""Check that runs of every method, frozen at commit 0c0ceea, are read, evaluated and continued as they were.

``make.py`` describes the runs, and ``recorded.json`` says what they ended with. Neither is ever made anew.
The bits must agree where torch, its CPU instructions and the processor are those of ``recorded.json``;
elsewhere the numbers must be close.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune import registry
from finetune.artifacts import reopen as finished
from finetune.config.load import load
from finetune.storage import manifest
from finetune.storage.delta import read_tensors
from finetune.storage.run_folder import RunFolder
from finetune.training import run

from .make import SAVED, STEPS, digest, machine

HERE = Path(__file__).parent
NAMES = sorted(file.parent.name for file in (HERE / "runs").glob("*/config.yaml"))
FINISHED = [name for name in NAMES if (HERE / "runs" / name / "result.json").is_file()]
RECORDED = json.loads((HERE / "recorded.json").read_text(encoding="utf-8"))
SAME_BITS = machine() == RECORDED["machine"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> RunFolder:
    """Copy the parametrized run, with the models and texts, and work beside it."""
    name = request.node.callspec.params["name"]
    for part in ("model", "gpt2", name):
        shutil.copytree(HERE / "runs" / part, tmp_path / part)
    shutil.copyfile(HERE / "runs/texts.csv", tmp_path / "texts.csv")
    monkeypatch.chdir(tmp_path)
    return RunFolder(Path(name))


def recorded(name: str) -> dict[str, Any]:
    """Return what a run ended with, or what the unfinished one must end with."""
    entry: dict[str, Any] = RECORDED["runs"][name]
    if "ends_as" in entry:  # but for the size of delta.json, which holds the run's name
        return {k: v for k, v in RECORDED["runs"][entry["ends_as"]].items() if k != "stored_bytes"}
    return entry


def agrees(found: Any, told: Any) -> bool:
    """Compare nested numbers: exactly where bits must agree, else with room for rounding and a flip."""
    if isinstance(told, dict):
        return found.keys() == told.keys() and all(agrees(found[key], told[key]) for key in told)
    if SAME_BITS or not isinstance(told, float):
        return bool(found == told)
    return math.isclose(found, told, rel_tol=1e-3, abs_tol=5e-3)


def test_every_method_of_that_commit_has_a_frozen_run() -> None:
    configs = [yaml.safe_load((HERE / "runs" / name / "config.yaml").read_text()) for name in NAMES]
    frozen = {config["method"]["name"] for config in configs}
    assert frozen <= set(registry.catalog("method"))  # those that came later have none
    assert len(frozen) == 20
    assert sorted(RECORDED["runs"]) == NAMES
    assert [name for name in NAMES if name not in FINISHED] == ["unfinished"]


def test_the_frozen_files_name_no_place_of_a_machine() -> None:
    for file in HERE.glob("runs/**/*"):
        if file.suffix in (".json", ".yaml", ".txt", ".jsonl", ".csv"):
            text = file.read_text(encoding="utf-8")
            assert not any(word in text for word in ('"/', " /", "/work", "/home", "/root", "/tmp")), file


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_configuration_keeps_its_hash(name: str) -> None:
    assert (
        load([], None, HERE / "runs" / name / "config.yaml").hash() == RECORDED["runs"][name]["config_hash"]
    )


@pytest.mark.parametrize("name", FINISHED)
def test_a_frozen_run_evaluates_to_what_it_recorded(name: str, place: RunFolder) -> None:
    told = recorded(name)["metrics"]
    result = place.read_result()
    assert result["metrics"] == told
    assert result["config_hash"] == RECORDED["runs"][name]["config_hash"]
    found = finished.evaluate(place.path)["metrics"]
    assert agrees(found, {split: told[split] for split in ("val", "test", "retention") if split in told})


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_run_resumes_to_its_recorded_result(name: str, place: RunFolder) -> None:
    """Go on from the checkpoint in the middle, as after a kill, and compare all that the run ends with."""
    told, twin = recorded(name), HERE / "runs" / RECORDED["runs"][name].get("ends_as", name)
    assert place.steps() == [SAVED]
    place.result.unlink(missing_ok=True)
    said: list[str] = []
    run.train(load([], None, place.config), place.path, said.append, lambda done, steps, words: None)
    assert any(f"Resuming from step {SAVED}," in line for line in said), said
    result = place.read_result()
    # delta.json names all settings, so a later setting adds some bytes to it; the tensors are compared below.
    for key in sorted(told.keys() & result.keys() - {"stored_bytes"}):
        assert agrees(result[key], told[key]), (key, result[key], told[key])
    assert [manifest.faults(folder) for folder in (place.delta, place.checkpoint(STEPS))] == [[], []]
    same_lines(place.metrics, twin / "metrics.jsonl")
    if SAME_BITS:
        state = digest(place.checkpoint(STEPS) / "state.safetensors")
        delta = hashlib.sha256((place.delta / "delta.safetensors").read_bytes()).hexdigest()
        assert (delta, state) == (told["delta_sha256"], told["final_state_sha256"])
    found, known = (read_tensors(folder / "delta/delta.safetensors") for folder in (place.path, twin))
    assert found.keys() == known.keys()
    for key, tensor in known.items():
        torch.testing.assert_close(
            found[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def same_lines(found: Path, told: Path) -> None:
    """Compare what was logged at each step, without the times that it took."""
    lines = [
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in (found, told)
    ]
    assert len(lines[0]) == len(lines[1])
    for one, other in zip(*lines, strict=True):
        kept = [{k: v for k, v in line.items() if k not in ("seconds", "time")} for line in (one, other)]
        assert agrees(*kept), kept
