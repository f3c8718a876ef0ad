"""A small place of a user's: a model, a data set, and one finished run of a sparse method on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .world import call


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``data.csv`` and a finished run of a sparse method with its checkpoints."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("original")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a cat sat"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", model_max_length=16
    ).save_pretrained(folder / "model")
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(bpe.get_vocab()) + 10, **sizes)).save_pretrained(
        folder / "model"
    )
    (folder / "data.csv").write_text(
        "text,label\n" + "".join(f"a {'cat' if i % 2 else 'dog'} sat {i},{i % 2}\n" for i in range(30))
    )
    settings = [
        "model=hf",
        "model.path=model",
        "dataset=csv",
        "dataset.path=data.csv",
        "method=shira",
        "method.sparsity=0.9",
    ]
    quick = [
        "train.steps=4",
        "train.batch_size=4",
        "train.eval_every=2",
        "train.save_every=2",
        "train.threads=1",
        "name=first",
        "run=run",
    ]
    said = call("train", *settings, *quick, folder=folder)
    assert said.code == 0, said
    return folder


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    """A copy of ``original`` to spoil."""
    folder = tmp_path / "place"
    shutil.copytree(original, folder)
    return folder
