"""From raw rows to tensors: images by the model's image processor, text by its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError
from .dataset import Raw, Row

Item = dict[str, Any]
KEPT_BYTES = 64 * 2**20  # processed images of a split are kept in memory up to this size
IGNORED = -100
LONGEST = 1024  # tokens per example when nobody asks: many tokenizers allow 100,000, some say 1e30


@dataclass(frozen=True)
class Batch:
    """``inputs``: pixel_values float32 [n, c, h, w], or input_ids and attention_mask int64 [n, length].

    ``labels``: int64 [n] of classes, or [n, length] aligned with input_ids and -100 where unscored (the loss shifts by one).
    ``bytes``: int64 [n], UTF-8 bytes of the text that each language-model window scores; None for classification.
    """

    ids: list[str]
    inputs: dict[str, Tensor]
    labels: Tensor
    bytes: Tensor | None


class Images(Dataset[Item]):
    """Rows with an image, processed when asked for; small sets stay in memory afterwards."""

    def __init__(self, rows: Sequence[Row], processor: Any) -> None:
        self.rows, self.processor = rows, processor
        self.kept: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        if i in self.kept:
            return self.kept[i]
        row = self.rows[i]
        pixels: Tensor = self.processor(images=row["image"].convert("RGB"), return_tensors="pt")[
            "pixel_values"
        ][0]
        item = {"id": row["id"], "pixel_values": pixels, "label": row["label"]}
        if pixels.numel() * 4 * len(self) <= KEPT_BYTES:
            self.kept[i] = item
        return item


class Tokens(Dataset[Item]):
    """Items whose text was tokenized beforehand."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Item:
        return self.items[i]


def texts(rows: Sequence[Row], tokenizer: Any, length: int) -> list[Item]:
    """One item a row, cut to ``length`` tokens; padding is left to ``collate``."""
    rows = list(rows)
    ids = (
        tokenizer([row["text"] for row in rows], truncation=True, max_length=length)["input_ids"]
        if rows
        else []
    )
    pad = tokenizer.pad_token_id
    return [
        {"id": row["id"], "input_ids": tokens, "label": row["label"], "pad": pad}
        for row, tokens in zip(rows, ids, strict=True)
    ]


def windows(row: Row, tokenizer: Any, length: int) -> list[Item]:
    """A row's text in windows of at most ``length`` tokens, each led by the start token, so that every byte is scored once.

    A window's bytes reach from its first token to the next window's first token: together they are the bytes of the text.
    """
    text, start = row["text"], start_token(tokenizer)
    coded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids, firsts = coded["input_ids"], [first for first, _ in coded["offset_mapping"]]
    before = [0, *accumulate(len(char.encode()) for char in text)]  # UTF-8 bytes before each character
    items = []
    for n, left in enumerate(range(0, len(ids), length - 1)):
        right = left + length - 1
        begin = 0 if n == 0 else before[firsts[left]]
        end = before[firsts[right]] if right < len(ids) else before[-1]
        items.append(
            {
                "id": f"{row['id']}#{n}",
                "input_ids": [start, *ids[left:right]],
                "bytes": end - begin,
                "pad": start,
            }
        )
    return items


def start_token(tokenizer: Any) -> int:
    """The token before the first one of a text: bos, else eos."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        "The tokenizer has neither a bos nor an eos token, and a window of text must start with one. Set one in tokenizer_config.json."
    )


def fitting_length(asked: int | None, tokenizer: Any) -> int:
    """Tokens per example: what was asked for, else the tokenizer's limit, at most 1,024."""
    limit = int(tokenizer.model_max_length)
    if asked is None:
        return min(limit, LONGEST)
    if asked > limit:
        raise ConfigError(
            f"dataset.length={asked} is more than the {limit} tokens that the model's tokenizer allows. Lower it to at most {limit}."
        )
    return asked


def encode(raw: Raw, processor: Any, length: int | None = None) -> dict[str, Dataset[Item]]:
    """The splits of ``raw`` as items for ``collate``. ``length`` overrides the data set's number of tokens per example."""
    if raw.task == "image_classification":
        return {split: Images(rows, processor) for split, rows in raw.splits.items()}
    size = fitting_length(length or raw.length, processor)
    if raw.task == "sequence_classification":
        return {split: Tokens(texts(rows, processor, size)) for split, rows in raw.splits.items()}
    found = {
        split: [item for row in rows for item in windows(row, processor, size)]
        for split, rows in raw.splits.items()
    }
    if empty := [split for split, items in found.items() if not items]:
        raise ConfigError(
            *(f"The {split} split of the data set holds no text. Give one that does." for split in empty)
        )
    return {split: Tokens(items) for split, items in found.items()}


def collate(items: Sequence[Item]) -> Batch:
    """A batch of items; token rows are padded on the right to the longest."""
    ids = [item["id"] for item in items]
    inputs = (
        padded(items)
        if "input_ids" in items[0]
        else {"pixel_values": torch.stack([item["pixel_values"] for item in items])}
    )
    if "label" in items[0]:
        return Batch(ids, inputs, torch.tensor([item["label"] for item in items]), None)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    labels[:, 0] = IGNORED
    return Batch(ids, inputs, labels, torch.tensor([item["bytes"] for item in items]))


def padded(items: Sequence[Item]) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 ``[n, longest]``."""
    width = max(len(item["input_ids"]) for item in items)
    ids = torch.tensor(
        [item["input_ids"] + [item["pad"]] * (width - len(item["input_ids"])) for item in items]
    )
    mask = torch.tensor(
        [[1] * len(item["input_ids"]) + [0] * (width - len(item["input_ids"])) for item in items]
    )
    return {"input_ids": ids, "attention_mask": mask}
