"""Finished runs on tiny models of several architectures, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config.load import load
from finetune.storage.run_folder import run_folder
from finetune.testing import contract
from finetune.training import run

WORDS = (  # noqa: SIM905
    "<pad> </s> <unk> the cat sat on a mat and another dog ran away from it while we all looked at them"
).split()
SMALL = [
    "train.steps=3",
    "train.batch_size=8",
    "train.eval_every=null",
    "train.threads=1",
    "name=t",
    "model=hf",
    "optimizer.lr=0.02",
]


def pictures(folder: Path) -> list[str]:
    """Forty pictures of two kinds."""
    for i in range(40):
        place = folder / "pictures" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 120, (16, 16, 3), np.uint8) + np.uint8(100 * (i % 2))
        Image.fromarray(pixels).save(place / f"{i}.png")
    return ["dataset=imagefolder", f"dataset.path={folder / 'pictures'}"]


def texts(folder: Path) -> list[str]:
    """Forty lines of words."""
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(WORDS[3:], 9)) for _ in range(40)]
    (folder / "texts.csv").write_text("text\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return ["dataset=csv", "dataset.task=causal_lm", f"dataset.path={folder / 'texts.csv'}"]


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


class Runs:
    """Trains on demand in ``folder``; a run is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, dict[tuple[str, ...], Path]()
        self.data = {"vit": pictures(folder), "gpt2": texts(folder), "llama": texts(folder)}

    def base(self, kind: Any, dtype: str = "float32") -> Path:
        """The folder of the tiny base model."""
        import torch

        place = self.folder / f"{kind}-{dtype}"
        if not place.is_dir():
            contract.tiny(kind).to(getattr(torch, dtype)).save_pretrained(place)
            if kind != "vit":
                tokenizer().save_pretrained(place)
        return place

    def __call__(self, kind: str, *words: str, dtype: str = "float32") -> Path:
        """The folder of a finished run of these settings."""
        key = (kind, dtype, *words)
        if key not in self.made:
            given = [
                *SMALL,
                *self.data[kind],
                f"run=r{len(self.made)}",
                f"model.path={self.base(kind, dtype)}",
                f"model.dtype={dtype}",
                *words,
            ]
            config = load(list({word.partition("=")[0]: word for word in given}.values()))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                run.train(config, run_folder(config), lambda line: None, lambda done, total, text: None)
            self.made[key] = self.folder / run_folder(config)
        return self.made[key]
