"""Check kept heads against what transformers computes from the same folder, and why other heads are new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune.config.settings import ModelConfig
from finetune.core.roles import in_head
from finetune.errors import ConfigError
from finetune.models.load import Base, load, original_parameters
from finetune.models.stored import fingerprint

NAMES = ("ant", "bee", "cat", "dog")
ORDER = ("dog", "ant", "cat", "bee")
IMAGE = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2}
TEXT_MODELS = {
    "bert": ("BertForSequenceClassification", {"pad_token": "<pad>"}),
    "roberta": ("RobertaForSequenceClassification", {"pad_token": "<pad>"}),
    "distilbert": ("DistilBertForSequenceClassification", {"pad_token": "<pad>"}),
    "electra": ("ElectraForSequenceClassification", {"pad_token": "<pad>"}),
    "llama": ("LlamaForSequenceClassification", {"pad_token": "<pad>"}),
    "gpt2": ("GPT2ForSequenceClassification", {"pad_token": "<pad>"}),
}


def read(folder: Path, labels: tuple[str, ...] = NAMES, head: Any = "auto", seed: int = 0) -> Base:
    task = "image_classification" if "ViT" in folder.name else "sequence_classification"
    return load(ModelConfig("hf", str(folder), head=head), task, labels, seed)


def rename(folder: Path, named: Any) -> None:
    """Write ``id2label`` into config.json as it is given, or remove it."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content.pop("id2label", None)
    content.pop("label2id", None)
    if named is not None:
        content["id2label"] = named
    file.write_text(json.dumps(content))


def named(names: tuple[str, ...]) -> dict[int, str]:
    return dict(enumerate(names))


@pytest.fixture
def vit(folder: Any) -> Path:
    """An image classifier whose labels have names."""
    path: Path = folder(
        "ViTForImageClassification",
        **IMAGE,
        num_hidden_layers=1,
        intermediate_size=32,
        id2label=named(NAMES),
    )
    return path


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a fixed input."""
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([[4, 5, 6, 4, 8, 9]])}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_a_kept_head_answers_in_the_runs_order(folder: Any, text: Any, kind: str) -> None:
    """RoBERTa's hidden size is the number of labels, so that shapes do not tell its head's layers apart."""
    name, special = TEXT_MODELS[kind]
    options = {**text, "num_hidden_layers": 1, "dim": 16, "n_heads": 2, "n_layers": 1, "n_layer": 1}
    if kind == "roberta":
        options["hidden_size"] = len(NAMES)
    path = folder(name, special, **options, id2label=named(NAMES))
    oracle = logits(getattr(transformers, name).from_pretrained(path, dtype=torch.float32))
    base = read(path, ORDER)
    assert not base.new_head
    assert base.head
    expected = oracle[:, [NAMES.index(label) for label in ORDER]]
    assert torch.equal(logits(base.model), expected)
    assert not torch.equal(expected, oracle)
    assert base.model.config.id2label == named(ORDER)
    assert torch.equal(logits(read(path).model), oracle)


def test_an_image_classifier_keeps_its_head_and_says_so(vit: Path) -> None:
    stored = load_file(vit / "model.safetensors")
    for head in ("auto", "keep"):
        base = read(vit, ORDER, head)
        rows = [NAMES.index(label) for label in ORDER]
        assert torch.equal(base.model.classifier.weight, stored["classifier.weight"][rows])
        assert torch.equal(base.model.classifier.bias, stored["classifier.bias"][rows])
        assert base.notes[-1] == (
            "The head of the checkpoint is kept: its labels are those of the data set, and its rows were put "
            "into the data set's order. model.head=new starts a new one."
        )
    assert "order" not in read(vit).notes[-1]


def test_a_new_head_is_initialized_from_the_seed(vit: Path) -> None:
    base = read(vit, head="new", seed=3)
    assert base.new_head
    draw = 0.02 * torch.randn((4, 16), generator=torch.Generator().manual_seed(3))
    assert torch.equal(base.model.classifier.weight, draw)
    assert not any("head" in note for note in base.notes)
    body = vit.parent / "ViTbody"
    transformers.ViTModel.from_pretrained(vit).save_pretrained(body)
    assert torch.equal(read(body, seed=3).model.classifier.weight, draw)


def test_other_labels_start_a_new_head_or_are_named(vit: Path) -> None:
    base = read(vit, ("ant", "bee", "cow"))
    assert base.new_head
    assert base.model.classifier.weight.shape == (3, 16)
    reason = "the checkpoint's labels are not those of the data set (missing: 'cow'; too many: 'cat', 'dog')"
    assert base.notes[-1] == f"The head is newly initialized: {reason}."
    with pytest.raises(ConfigError) as caught:
        read(vit, ("ant", "bee", "cow"), "keep")
    assert caught.value.faults == (
        f"model.head=keep: the head of model.path={vit} cannot be kept: {reason}. "
        "Take model.head=new to train a new head.",
    )
    many = tuple(f"label {i}" for i in range(9))
    assert "'label 4' and 4 more" in read(vit, many).notes[-1]


def test_a_checkpoint_without_a_head(vit: Path, folder: Any, text: Any) -> None:
    body = vit.parent / "ViTbody"
    transformers.ViTModel.from_pretrained(vit).save_pretrained(body)
    assert read(body).notes[-1] == "The head is newly initialized: the checkpoint has no classifier.weight."
    masked = folder("BertForMaskedLM", {"pad_token": "<pad>"}, **text, id2label=named(NAMES))
    assert "the checkpoint has no bert.pooler.dense.weight" in read(masked).notes[-1]
    with pytest.raises(ConfigError, match=r"cannot be kept: the checkpoint has no classifier\.weight\."):
        read(body, head="keep")


def test_labels_without_names_are_kept_only_where_they_are_asked_for(vit: Path) -> None:
    unnamed = ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    rename(vit, named(unnamed))
    for labels in (NAMES, unnamed):
        assert "have no names, only placeholders such as LABEL_0" in read(vit, labels).notes[-1]
    assert not read(vit, unnamed, "keep").new_head
    with pytest.raises(ConfigError, match="have no names"):
        read(vit, NAMES, "keep")


def test_a_head_of_another_shape_than_config_json_says(vit: Path) -> None:
    stored = load_file(vit / "model.safetensors")
    stored["classifier.weight"] = torch.zeros(7, 16)
    save_file(stored, vit / "model.safetensors", {"format": "pt"})
    assert "classifier.weight has another shape in the checkpoint" in read(vit).notes[-1]


def test_a_head_of_several_parts_is_kept_only_where_the_output_is_clear(folder: Any, text: Any) -> None:
    options = {**text, "id2label": named(NAMES), "type_vocab_size": 0, "relative_attention": False}
    path = folder("DebertaV2ForSequenceClassification", {"pad_token": "<pad>"}, **options)
    oracle = logits(
        transformers.DebertaV2ForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    )
    expected = oracle[:, [NAMES.index(label) for label in ORDER]]
    assert torch.equal(logits(read(path, ORDER).model), expected)
    narrow = {**options, "hidden_size": 4, "pooler_hidden_size": 4, "num_attention_heads": 2}
    path = folder("DebertaV2ForSequenceClassification", {"pad_token": "<pad>"}, **narrow)
    assert not read(path).new_head
    assert "it is not clear which layer computes the logits" in read(path, ORDER).notes[-1]


def test_a_language_model_has_no_head_to_keep(llama: Path) -> None:
    config = ModelConfig("hf", str(llama), head="keep")
    with pytest.raises(ConfigError, match=r"model\.head=keep: the data set's task causal_lm has no labels"):
        load(config, "causal_lm", (), 0)


def test_a_kept_head_belongs_to_the_base(vit: Path) -> None:
    base = read(vit)
    mark = fingerprint(base.model, base.new_parameters)
    assert mark == fingerprint(base.model, ())
    assert all(torch.equal(t, dict(original_parameters(base))[n]) for n, t in base.model.named_parameters())
    stored = load_file(vit / "model.safetensors")
    stored["classifier.bias"][1] += 1
    save_file(stored, vit / "model.safetensors", {"format": "pt"})
    other = read(vit)
    assert fingerprint(other.model, other.new_parameters) != mark
    assert fingerprint(other.model, other.head) == fingerprint(base.model, base.head)
    new = read(vit, head="new")
    assert new.new_parameters == new.head == tuple(n for n in stored if in_head(new.model, n))[::-1]


HOSTILE: dict[str, Any] = {
    "a list": list(NAMES),
    "a text": "ant",
    "a number": 4,
    "nothing": {},
    "duplicate names": dict(enumerate(("ant", "bee", "cat", "cat"))),
    "rows from one": dict(enumerate(NAMES, 1)),
    "negative rows": {"-1": "ant", "0": "bee", "1": "cat", "2": "dog"},
    "rows in words": {"one": "ant", "two": "bee"},
    "names that are lists": {i: [name] for i, name in enumerate(NAMES)},
    "names that are null": dict.fromkeys(range(4)),
    "thousands": {i: f"label {i}" for i in range(3000)},
    "long names": {i: name * 10**5 for i, name in enumerate(NAMES)},
    "control characters": {i: f"{name}\x1b[2J\n" for i, name in enumerate(NAMES)},
    "a nest": {"0": {"0": {"0": "ant"}}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_absurd_table_of_labels_keeps_no_head(vit: Path, name: str) -> None:
    """Either the folder is refused, or its head is left out with a short reason; nothing else is raised."""
    rename(vit, HOSTILE[name])
    with pytest.raises(ConfigError) as caught:
        read(vit, head="keep")
    assert len(str(caught.value)) < 500
    if "cannot be built" not in str(caught.value):
        assert "model.head=keep: " in str(caught.value)
        assert "The head is newly initialized: " in (note := read(vit).notes[-1])
        assert len(note) < 500
        assert note.isprintable()
