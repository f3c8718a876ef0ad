"""Every file in conf/ makes a run that trains."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from finetune import registry
from finetune.config.load import conf_dir, load
from finetune.testing import contract
from finetune.training import run

FILES = sorted(
    str(f.relative_to(conf_dir()).with_suffix(""))
    for f in conf_dir().glob("*/*.yaml")
    if f.parent.name not in registry.outside_runs()
)
SHORT = {"train.steps": "3", "train.batch_size": "4", "train.threads": "1"}
FITTING = {
    "schedule.every": "2",
    "schedule.dense": "0.5",
    "method.window": "1",
}  # what they must be to mean anything in so short a run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and the same small tables and images in every format that a file of conf/dataset reads."""
    folder = tmp_path_factory.mktemp("made")
    contract.tiny().save_pretrained(folder / "model")
    rows = [(f"the {'good' if i % 2 else 'bad'} one, number {i}", i % 2) for i in range(40)]
    import pandas as pd

    table = pd.DataFrame(rows, columns=["text", "label"])
    table.to_csv(folder / "d.csv", index=False)
    table.to_json(folder / "d.jsonl", orient="records", lines=True)
    table.to_parquet(folder / "d.parquet")
    for i in range(40):
        place = folder / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (6 * i, 5 * i, 128)).save(place / f"{i}.png")
    bert(folder / "bert")
    return {name: folder / name for name in ("model", "bert", "d.csv", "d.jsonl", "d.parquet", "images")}


def bert(folder: Path) -> None:
    """A text classifier with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "the", "good", "bad", "one", "number"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
    }
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def fitting(file: str) -> dict[str, str]:
    """Settings of what a file chooses, and of the schedule that it has."""
    group, _, option = file.partition("/")
    stated = yaml.safe_load((conf_dir() / f"{file}.yaml").read_text())
    cls = registry.get(group, stated.get(group, stated).get("name", option))  # type: ignore[arg-type]  # one of the kinds
    held = {"schedule": getattr(cls, "schedule", None), group: cls}
    known = {f"{where}.{f.name}" for where, what in held.items() if what for f in fields(what)}
    return {key: value for key, value in FITTING.items() if key in known}


def overrides(file: str, made: dict[str, Path]) -> dict[str, str]:
    group, _, option = file.partition("/")
    if group == "model":
        more = (
            {"model.path": str(made["model"])}
            if option == "hf"
            else {"dataset": "stdlib"}
            if option == "tiny_lm"
            else {}
        )
        return {**more, "method": "lora"}
    small = {"model": "hf", "model.path": str(made["model"])}
    if group == "dataset":
        tables = {"csv": "d.csv", "jsonl": "d.jsonl", "parquet": "d.parquet", "imagefolder": "images"}
        place = (
            {"dataset.path": str(made[tables[option]]) if option in tables else "someone/words"}
            if option in (*tables, "hub")
            else {}
        )
        if option == "stdlib":
            return {**place, "model": "tiny_lm", "method": "lora"}
        return {
            **place,
            "model": "hf",
            "model.path": str(made["bert" if option in ("csv", "jsonl", "parquet", "hub") else "model"]),
        }
    if group in ("schedule", "method"):
        return {**small, "method": "shira", **fitting(file)}
    if group == "selector":
        return {**small, "method": "shira", **({} if option == "none" else {"selector.every": "2"})}
    return {**small, "logger.project": "test"} if file == "logger/wandb" else small


@pytest.mark.parametrize("file", FILES)
def test_every_file_makes_a_run(
    file: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    group, _, option = file.partition("/")
    stdlib = {
        "dataset.train_bytes": "4000",
        "dataset.val_bytes": "2000",
        "dataset.test_bytes": "2000",
        "dataset.retention_bytes": "2000",
    }
    given = {**SHORT, **overrides(file, made), group: option}
    given |= stdlib if given.get("dataset") == "stdlib" else {}
    if option == "hub":  # whose cache tests/data/test_hub.py lays out
        rows = {
            "text": [f"the {'good' if i % 2 else 'bad'} one, number {i}" for i in range(40)],
            "label": [i % 2 for i in range(40)],
        }
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *given, **options: {"train": datasets.Dataset.from_dict(rows)}
        )
    config = load([f"{key}={value}" for key, value in given.items()])
    result = run.train(config, tmp_path / "run", lambda line: None, lambda done, total, words: None)
    assert result["status"] == "finished"
    assert result["steps"] == 3
    assert result["params"]["trained"] > 0


def test_the_list_is_of_all_groups() -> None:
    groups = {"model", "method", "schedule", "selector", "dataset", "optimizer", "train", "logger"}
    assert {f.partition("/")[0] for f in FILES} == groups
