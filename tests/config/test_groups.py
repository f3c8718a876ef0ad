"""Every file in conf/ is read, and one file of each group makes a run that trains.

tests/config/test_load.py composes a configuration from every file of a run's groups.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import registry
from finetune.config.load import conf_dir, expand, load
from finetune.sweep import cluster, grid
from finetune.testing import contract
from finetune.training import run

SHORT = ["train.steps=3", "train.batch_size=4", "train.threads=1", "train.eval_batch_size=500"]
FEW = ["dataset.train_bytes=4000"] + [f"dataset.{split}_bytes=2000" for split in ("val", "test", "retention")]
# the file of each group that differs most from what other tests run; {folder} has a tiny model and a table
RUNS = {
    "model": ["model=tiny_lm", "dataset=stdlib", "method=lora", *FEW],
    "dataset": ["dataset=csv", "dataset.path={folder}/table.csv", "model=hf", "model.path={folder}/bert"],
    "method": ["method=lift", "schedule.every=2"],
    "schedule": ["method=shira", "schedule=cubic", "schedule.every=2"],
    "selector": ["method=shira", "selector=ist", "selector.every=2"],
    "optimizer": ["method=shira", "optimizer=sm3"],
    "objective": ["method=shira", "objective=kd"],
    "train": ["method=shira", "train=smoke"],
    "logger": ["method=shira", "logger=wandb", "logger.project=test"],
}
for _group in registry.choices():  # a kind that is not entered runs with its first file
    _files = sorted((conf_dir() / _group).glob("*.yaml"))
    if _files and _group not in RUNS:
        RUNS[_group] = ["method=shira", f"{_group}={_files[0].stem}"]
SMALL = ["model=hf", "model.path={folder}/model", "dataset.retention_images=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image model, a tiny text classifier and a table of texts."""
    place = tmp_path_factory.mktemp("made")
    contract.tiny().save_pretrained(place / "model")
    write_bert(place / "bert")
    lines = ["text,label"]
    for i in range(40):
        lines.append(f"the {'good' if i % 2 else 'bad'} one number {i},{i % 2}")
    (place / "table.csv").write_text("\n".join(lines))
    return place


def write_bert(folder: Path) -> None:
    """Write a text classifier with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "the", "good", "bad", "one", "number"]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)


def test_every_group_is_read_by_some_test() -> None:
    groups = {path.parent.name for path in conf_dir().glob("*/*.yaml")}
    assert groups >= RUNS.keys()
    assert groups <= {*RUNS, *registry.outside_runs()}


GROUPS = [pytest.param(name, marks=pytest.mark.processes) if name == "logger" else name for name in RUNS]


@pytest.mark.parametrize("group", GROUPS)  # wandb starts a process
def test_one_file_of_each_group_makes_a_run(
    group: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = RUNS[group] if group in ("model", "dataset") else [*SMALL, *RUNS[group]]
    config = load([text.format(folder=folder) for text in (*SHORT, *settings)])
    result = run.train(config, tmp_path / "run", lambda line: None, lambda done, total, words: None)
    assert result["status"] == "finished"
    assert result["steps"] == 3
    assert result["params"]["trained"] > 0


@pytest.mark.parametrize("path", sorted((conf_dir() / "launcher").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launcher_file_is_read(path: Path) -> None:
    assert path.stem in cluster.PLUGINS
    assert cluster._settings(path.stem, None)


@pytest.mark.parametrize("path", sorted((conf_dir() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_file_lists_runs_that_load(path: Path) -> None:
    points = expand([text for text in grid.preset(path.stem) if not text.startswith("budget=")])
    methods = {words[0]: words for words in points}
    for words in methods.values():  # one point of each method
        load(words)
    assert len(points) > len(methods) > 1
