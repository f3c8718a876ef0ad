"""Check runs that keep a trained head: they start where the merged run ended, and train or freeze it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.artifacts.merge import merge
from finetune.artifacts.reopen import evaluate, rebuild
from finetune.artifacts.unmerge import unmerge
from finetune.config.load import load
from finetune.errors import ConfigError
from finetune.methods.reparam.lora import LoRA
from finetune.storage.run_folder import run_folder
from finetune.sweep.size import measure
from finetune.testing import contract
from finetune.training import run
from finetune.training.build import Pretrained, build_states
from finetune.training.plan import plan
from finetune.training.prepare import count_parameters, prepare

from ..support.plain_runs import SMALL, Runs

HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def merged(runs: Runs) -> tuple[Path, dict[str, Any]]:
    """A merged run on two classes of pictures, and its metrics."""
    first = runs("vit", "method=lora", "optimizer.lr=0.05")
    merge(first, runs.folder / "merged")
    return runs.folder / "merged", json.loads((first / "result.json").read_text())["metrics"]


def words(runs: Runs, folder: Path, *more: str) -> list[str]:
    given = [*SMALL, *runs.data["vit"], f"model.path={folder}", "method=lora", *more]
    return list({word.partition("=")[0]: word for word in given}.values())


def train(runs: Runs, folder: Path, *more: str) -> tuple[Path, dict[str, Any]]:
    config = load(words(runs, folder, *more))
    place = runs.folder / run_folder(config)
    return place, run.train(config, place, lambda line: None, lambda done, total, text: None)


def swap_labels(merged: Path, out: Path) -> Path:
    """Copy the folder with its labels, and the rows of its head, in the other order."""
    shutil.copytree(merged, out)
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "class0", "1": "class1"}
    config |= {"id2label": {"0": "class1", "1": "class0"}, "label2id": {"class1": 0, "class0": 1}}
    (out / "config.json").write_text(json.dumps(config))
    stored = load_file(out / "model.safetensors")
    for name in HEAD:
        stored[name] = stored[name].flip(0).contiguous()
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_base_of_a_run_on_a_merged_folder_has_the_metrics_of_before(
    runs: Runs, merged: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, before = merged
    assert before["test"] != before["base"]  # something was learned
    for place in (folder, swap_labels(folder, tmp_path / "swapped")):
        path, result = train(runs, place, f"run={place.name}")
        assert result["metrics"]["base"] == pytest.approx(before["test"], rel=1e-5)
        assert result["metrics"]["test"] != result["metrics"]["base"]
        assert evaluate(path)["metrics"]["test"] == result["metrics"]["test"]
        assert not result["suspect"]
    _, result = train(runs, folder, "run=anew", "model.head=new")
    assert result["metrics"]["base"]["loss"] != pytest.approx(before["test"]["loss"], rel=1e-2)


def test_a_tuned_kept_head_is_merged_and_unmerged_as_a_layer_is(
    runs: Runs, merged: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, result = train(runs, merged[0], "run=bias", "method=bitfit")
    merge(path, tmp_path / "twice")
    _, third = train(runs, tmp_path / "twice", "run=third")
    assert third["metrics"]["base"] == pytest.approx(result["metrics"]["test"], rel=1e-5)
    unmerge(tmp_path / "twice", tmp_path / "back")
    before, after = (load_file(place / "model.safetensors") for place in (merged[0], tmp_path / "back"))
    tuned = load_file(tmp_path / "twice" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert not torch.equal(tuned["classifier.weight"], before["classifier.weight"])


@pytest.mark.parametrize("change", ["the values of the head", "the names of the labels"])
def test_a_run_is_not_reopened_on_a_folder_with_another_head(
    runs: Runs, merged: tuple[Path, dict[str, Any]], tmp_path: Path, change: str
) -> None:
    shutil.copytree(merged[0], tmp_path / "base")
    path, _ = train(runs, tmp_path / "base", f"run={change.replace(' ', '-')}")
    rebuild(path)
    if change == "the values of the head":
        stored = load_file(tmp_path / "base" / "model.safetensors")
        stored["classifier.bias"][0] += 1e-3
        save_file(stored, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    else:
        config = tmp_path / "base" / "config.json"
        config.write_text(config.read_text().replace("class1", "other"))
    for use in (rebuild, evaluate, lambda place: merge(place, tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"is not the model that .* was trained on: its weights differ"):
            use(path)


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "lt_sft"])
def test_a_frozen_head_stays_as_it_was(runs: Runs, merged: tuple[Path, dict[str, Any]], method: str) -> None:
    trained = prepare(load(words(runs, merged[0], f"method={method}", "run=t")))
    path, result = train(runs, merged[0], f"method={method}", "method.head=false", f"run=frozen-{method}")
    kept = load_file(merged[0] / "model.safetensors")
    setup = rebuild(path)
    for name in HEAD:
        assert torch.equal(setup.session.model.get_parameter(name), kept[name])
    entries = sum(kept[name].numel() for name in HEAD)
    counts = count_parameters(trained)
    assert setup.config.method.head is False
    assert result["params"]["adapted"] == counts["adapted"] - entries
    assert count_parameters(setup)["adapted"] == counts["adapted"] - entries
    if method != "lt_sft":  # whose first phase trains more than the last
        assert result["params"]["trained"] == counts["trained"] - entries
        assert plan(setup.config)["params"] == result["params"]
    size = measure(setup.config)
    assert (size.trained, size.head) == (result["params"]["trained"], 0)
    assert result["metrics"]["test"] != result["metrics"]["base"]
    assert not result["suspect"]
    assert evaluate(path)["metrics"]["test"] == result["metrics"]["test"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["method=lora", "model.head=new"], r"method\.head=false would leave a new head untrained"),
        (["method=head"], r"method=head has nothing to train here: method\.head=false freezes the head"),
    ],
)
def test_a_head_that_must_be_trained_is_not_frozen(
    runs: Runs, merged: tuple[Path, dict[str, Any]], more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(load(words(runs, merged[0], "method.head=false", *more)))


def test_a_language_model_has_no_head_to_freeze() -> None:
    with pytest.raises(ConfigError, match=r"method\.head=false has no effect on a language model"):
        build_states(Pretrained(contract.tiny("gpt2"), train_head=False), LoRA())


def test_retention_still_compares_with_the_answers_before_training(tmp_path: Path) -> None:
    """The rows of the kept head are in another order than in the checkpoint, which must not matter."""
    import transformers

    names = {row: str((row + 3) % 10) for row in range(10)}
    options = {**contract.tiny().config.to_dict(), "id2label": names}
    torch.manual_seed(0)
    plain = transformers.ViTForImageClassification(transformers.ViTConfig(**options)).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(8.0)  # so that the answers differ
    plain.save_pretrained(tmp_path / "model")
    given = ["model=hf", f"model.path={tmp_path / 'model'}", "dataset.retention_images=40", "method=lora"]
    setup = prepare(load([*given, "train.threads=1"]))
    assert not setup.base.new_head
    with torch.no_grad():
        for parameter in setup.session.states.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))

    def answers(model: Any, labels: Any) -> list[str]:
        found = []
        for row in setup.data["retention"].rows:
            inputs = setup.base.processor(images=row["image"].convert("RGB"), return_tensors="pt")
            with torch.no_grad():
                found.append(labels[int(model(**inputs).logits.argmax())])
        return found

    measured = setup.evaluate("retention").metrics["accuracy"]
    before = answers(plain, names)
    setup.session.states["head"].gate = 0.0
    after = answers(setup.session.model.eval(), setup.labels)
    kept = sum(a == b for a, b in zip(before, after, strict=True)) / len(before)
    assert len(set(before)) > 2
    assert 0 < kept < 1
    assert measured == pytest.approx(kept)
