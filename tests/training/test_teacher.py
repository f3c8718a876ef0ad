"""Test which teachers a distillation run takes, and what it says of those that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import finetune
from finetune.artifacts.reopen import evaluate
from finetune.config.load import load
from finetune.config.settings import Config
from finetune.errors import ConfigError
from finetune.models import folder
from finetune.testing import contract
from finetune.training.prepare import prepare

TEXT = ["model=tiny_lm", "dataset=stdlib", "dataset.length=32", "train.steps=2", "train.batch_size=2"]
TEXT += ["dataset.train_bytes=4000"]
TEXT += [f"dataset.{split}_bytes=1000" for split in ("val", "test", "retention")]


def config(teacher: Any, *words: str) -> Config:
    return load(["method=lora", "objective=kd", f"objective.teacher={teacher}", *words])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the built-in language model, which a test changes."""
    return shutil.copytree(folder.BUILTIN / "tiny_lm", tmp_path / "teacher")


def test_a_teacher_in_a_folder_gives_its_own_predictions(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    changed = {name: tensor * 1.1 for name, tensor in weights.items()}
    save_file(changed, copied / "model.safetensors", {"format": "pt"})
    session = prepare(config(copied, *TEXT)).session
    batch = next(session.batches.steps(0, 1))[0]
    assert batch is not None
    with torch.no_grad():
        ours = session.tuned(**batch.inputs).logits
        wanted = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)(**batch.inputs).logits
    theirs = session.run.reference(str(copied))(batch).logits
    torch.testing.assert_close(theirs, wanted)
    assert not torch.allclose(ours, theirs, atol=0.1)
    assert set(session.references.fingerprints()) == {str(copied)}


def test_another_vocabulary_is_refused(copied: Path) -> None:
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=rf"objective\.teacher={copied} has another vocabulary"):
        prepare(config(copied, *TEXT))


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("builtin:tiny_vit", "is a vit, which does not fit the data set's task causal_lm"),
        ("/nowhere", "objective.teacher=/nowhere: there is no such folder"),
    ],
)
def test_what_is_no_teacher_is_refused(teacher: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare(config(teacher, *TEXT))


def test_a_run_is_no_teacher(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match=r"is a run, not a model\. Write its model with `finetune merge"):
        prepare(config(tmp_path, *TEXT))


def test_another_architecture_cannot_teach_hidden_states(copied: Path) -> None:
    settings = json.loads((copied / "config.json").read_text())
    settings["num_hidden_layers"] -= 1
    (copied / "config.json").write_text(json.dumps(settings))
    words = ["method=lora", "objective=squarehead", f"objective.teacher={copied}", *TEXT]
    with pytest.raises(ConfigError, match="has 4 layers of width 128 and the model has 5"):
        prepare(load(words))
    prepare(config(copied, *TEXT))  # which another objective does not mind


def test_a_classifier_teaches_with_its_own_head_in_the_order_of_the_labels(tmp_path: Path) -> None:
    names = [str((row + 3) % 10) for row in range(10)]
    options = {**contract.tiny().config.to_dict(), "id2label": dict(enumerate(names))}
    ViTForImageClassification(ViTConfig(**options)).save_pretrained(tmp_path / "teacher")
    contract.tiny().save_pretrained(tmp_path / "model")
    words = ["model=hf", f"model.path={tmp_path / 'model'}", "dataset=digits", "train.batch_size=2"]
    setup = prepare(config(tmp_path / "teacher", *words))
    batch = next(setup.session.batches.steps(0, 1))[0]
    assert batch is not None
    with torch.no_grad():
        plain = ViTForImageClassification.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
        wanted = plain.eval()(**batch.inputs).logits[:, [names.index(label) for label in setup.labels]]
    taught = setup.session.run.reference(str(tmp_path / "teacher"))(batch).logits
    torch.testing.assert_close(taught, wanted)
    with pytest.raises(ConfigError, match="has no trained head for the classes of this data set"):
        prepare(config(tmp_path / "model", *words))


def test_a_finished_run_is_opened_without_its_teacher(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    words = ["method=lora", "objective=kd", f"objective.teacher={copied}", *TEXT, "train.eval_every=null"]
    run, result = finetune.train(*words, "logger=none")
    shutil.rmtree(copied)
    assert evaluate(run)["metrics"]["test"] == result["metrics"]["test"]
