"""Train whole runs on small data; check their files, and that eval, merge and plan agree with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from finetune.artifacts import merge
from finetune.artifacts import reopen as finished
from finetune.config.load import load
from finetune.config.settings import Config
from finetune.errors import ConfigError, RunFailed
from finetune.storage.delta import read_description
from finetune.storage.progress import ProgressRecord
from finetune.storage.run_folder import RunFolder, run_folder
from finetune.testing import contract
from finetune.training import run, selection
from finetune.training.checkpoints import Checkpoints
from finetune.training.evaluate import evaluate
from finetune.training.plan import plan as planned
from finetune.training.prepare import prepare

SMALL = ["train.steps=6", "train.eval_every=2", "train.batch_size=8", "train.save_every=2", "name=t"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ViT in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("model")
    contract.tiny().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(model: str, *more: str) -> Config:
    given = {text.partition("=")[0]: text for text in (*SMALL, "model=hf", f"model.path={model}", *more)}
    return load(list(given.values()))


def go(settings: Config) -> tuple[dict[str, Any], RunFolder, list[str]]:
    said: list[str] = []
    folder = run_folder(settings)
    return run.train(settings, folder, said.append, lambda done, total, words: None), RunFolder(folder), said


@pytest.mark.parametrize("method", ["snell", "shira", "full", "lora", "bitfit", "head"])
def test_eval_gives_the_very_numbers_and_merge_a_plain_model(model: str, here: Path, method: str) -> None:
    result, files, _ = go(config(model, f"method={method}", "optimizer.lr=0.01"))
    assert result == files.read_result()
    assert finished.evaluate(files.path)["metrics"] == {
        k: result["metrics"][k] for k in ("val", "test", "retention")
    }
    merged = merge.merge(files.path, here / "merged")
    assert merged["largest_logit_difference"] < 1e-4
    import transformers

    plain = transformers.AutoModelForImageClassification.from_pretrained(here / "merged", dtype=torch.float32)
    setup = finished.rebuild(files.path)
    found = evaluate(plain, setup.data["test"], 100, setup.session.accelerator).metrics
    assert found["accuracy"] == result["metrics"]["test"]["accuracy"]
    assert found["loss"] == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-5)


def test_files_of_a_run(model: str, here: Path) -> None:
    settings = config(model, "method=shira", "sparsity=0.9")
    result, files, _ = go(settings)
    assert yaml.safe_load(files.config.read_text()) == settings.as_dict()
    lines = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_accuracy" in line] == [2, 4, 6]
    rows = pq.read_table(files.predictions).to_pylist()
    assert len(rows) == len({r["id"] for r in rows}) == 597
    assert sum(r["label"] == r["prediction"] for r in rows) / 597 == result["metrics"]["test"]["accuracy"]
    assert sorted(p.name for p in (files.path / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert result["stored_bytes"] == sum(p.stat().st_size for p in files.delta.glob("delta.*"))
    head, body = (
        10 * 32 + 10,
        sum(s[0] * s[1] - round(0.9 * s[0] * s[1]) for s in [(32, 32)] * 8 + [(48, 32), (32, 48)] * 2),
    )
    assert result["params"]["trained"] == head + body
    assert result["params"]["adapted"] == 8 * 32 * 32 + 4 * 48 * 32 + head
    assert result["config_hash"] == settings.hash()


def test_the_best_step_is_chosen_on_validation(model: str, here: Path) -> None:
    result, files, _ = go(
        config(model, "method=lora", "optimizer.lr=0.05", "train.steps=10", "train.eval_every=1")
    )
    lines = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    accuracies = {
        line["step"]: (line["val_accuracy"], -line["val_loss"]) for line in lines if "val_accuracy" in line
    }
    assert len(accuracies) == 10
    assert result["best_step"] == max(accuracies, key=lambda step: accuracies[step])
    assert read_description(files.delta)["step"] == result["best_step"]


def test_an_interrupted_run_resumes_to_the_same_bits(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, files, _ = go(config(model, "method=snell", "run=whole"))
    real = Checkpoints.save

    def save_and_die(self: Checkpoints, record: ProgressRecord) -> Path:
        real(self, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        go(config(model, "method=snell", "run=broken"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    resumed, again, said = go(config(model, "method=snell", "run=broken"))
    assert "Resuming from step 2" in said[-1]
    assert resumed["metrics"] == whole["metrics"]
    assert (again.delta / "delta.safetensors").read_bytes() == (
        files.delta / "delta.safetensors"
    ).read_bytes()

    def numbers(folder: RunFolder) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in folder.metrics.read_text().splitlines()
        ]

    assert numbers(again) == numbers(files)


def test_the_clock_ends_a_run_cleanly(model: str, here: Path) -> None:
    result, _, said = go(config(model, "train.max_seconds=0.000001", "method=lora"))
    assert result["status"] == "finished"
    assert result["steps"] == 1
    assert any("train.max_seconds" in line for line in said)


def test_a_loss_that_is_not_finite_leaves_the_state_and_the_examples(model: str, here: Path) -> None:
    with pytest.raises(RunFailed, match=r"The loss is (nan|inf) at step \d"):
        go(config(model, "method=full", "optimizer.lr=1e20", "train.clip=null", "optimizer.warmup=0"))
    files = RunFolder(next((here / "outputs" / "t").iterdir()))
    failure = json.loads((files.path / "failure.json").read_text())
    assert files.read_result()["status"] == "failed"
    assert len(failure["ids"]) == 8
    assert (files.checkpoint(failure["step"] - 1) / "state.safetensors").is_file()


def test_plan_predicts_what_the_run_does_and_writes_nothing(model: str, here: Path) -> None:
    settings = config(model, "method=shira", "sparsity=0.9")
    plan = planned(settings)
    assert not list(here.iterdir())
    result, files, _ = go(settings)
    assert plan["params"] == result["params"]
    assert sum(layer["trained"] for layer in plan["layers"]) == result["params"]["trained"]
    written = (files.delta / "delta.safetensors").stat().st_size
    assert 0 <= written - plan["stored_bytes"] < 2000  # the file's own header
    assert plan["expected_peak_memory_bytes"] > 100e6


def test_plan_of_several_phases_describes_the_last_and_leaves_open_what_the_earlier_decide(
    model: str, here: Path
) -> None:
    settings = config(model, "method=lt_sft", "sparsity=0.9")
    plan, (result, _, _) = planned(settings), go(settings)
    assert plan["params"] == result["params"]
    assert {layer["trained"] for layer in plan["layers"] if "classifier" not in layer["layer"]} == {None}
    assert "The phases before the last" in plan["notes"][-1]


def test_trained_counts_what_was_trained_whatever_step_was_best(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = iter(range(0, -9, -1))
    monkeypatch.setattr(
        selection, "sort_key", lambda metrics: (next(keys),)
    )  # the first validation stays the best
    settings = config(model, "method=lift", "sparsity=0.9", "schedule.every=1")
    plan, (result, _, _) = planned(settings), go(settings)
    assert result["best_step"] == 2
    assert result["params"] == plan["params"]


def test_a_changed_base_a_damaged_delta_and_other_labels_are_refused(model: str, here: Path) -> None:
    _, files, _ = go(config(model, "method=lora"))
    rows = "".join(f"x{i},{'ab'[i % 2]}\n" for i in range(40))
    (here / "d.csv").write_text("text,label\n" + rows)
    three = here / "three"
    for i in range(30):
        place = three / f"c{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        from PIL import Image

        Image.new("RGB", (16, 16), (i, 2 * i, 3 * i)).save(place / f"{i}.png")
    dataset = load(["dataset=imagefolder", f"dataset.path={three}"]).dataset
    with pytest.raises(ConfigError, match=r"has 3 labels and the head of .* has 10"):
        finished.evaluate(files.path, dataset)
    delta = files.delta / "delta.safetensors"
    whole = delta.read_bytes()
    delta.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"delta.safetensors is damaged or cut short"):
        finished.evaluate(files.path)
    delta.write_bytes(whole)
    other = contract.tiny()
    other.vit.layernorm.bias.data += 1
    other.save_pretrained(here / "other")
    frozen = yaml.safe_load(files.config.read_text())
    frozen["model"]["path"] = str(here / "other")
    files.config.write_text(yaml.safe_dump(frozen))
    with pytest.raises(ConfigError, match="its weights differ"):
        finished.evaluate(files.path)


def test_merge_refuses_above_the_tolerance_and_a_folder_in_use(model: str, here: Path) -> None:
    _, files, _ = go(config(model, "method=lora", "optimizer.lr=0.05"))
    with pytest.raises(ConfigError, match="more than --tolerance 0; nothing was written"):
        merge.merge(files.path, here / "out", tolerance=0.0)
    assert not (here / "out").exists()
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merge.merge(files.path, here / "out")
    assert [p.name for p in (here / "out").iterdir()] == ["mine.txt"]


def test_precision_that_cannot_be_had_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=r"model.dtype=bfloat16 needs train.precision=bf16"):
        prepare(config(model, "model.dtype=bfloat16"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train.precision=fp16 needs a GPU"):
            prepare(config(model, "train.precision=fp16"))
        with pytest.raises(ConfigError, match=r"torch sees no CUDA device"):
            prepare(replace(config(model), train=replace(config(model).train, device="cuda")))


def test_bfloat16_base_runs_and_evaluates_the_same(model: str, here: Path) -> None:
    result, files, _ = go(config(model, "model.dtype=bfloat16", "train.precision=bf16", "method=shira"))
    assert finished.evaluate(files.path)["metrics"]["test"] == result["metrics"]["test"]
    merged = merge.merge(files.path, here / "merged")
    assert merged["same_predictions"] > 0.95
