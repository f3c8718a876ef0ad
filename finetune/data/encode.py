"""Encode raw examples as tensors: images by the model's image processor, text by its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.loss import IGNORED
from ..errors import ConfigError
from .dataset import Example, Raw

Item = dict[str, Any]  # an encoded example, which ``collate`` takes
CACHED_BYTES = 64 * 2**20  # processed images of a split stay in memory up to this size in total
TRAIN = "train"  # the stream of the examples of the data set itself
LONGEST = 1024  # default tokens of an example: many tokenizers allow 100,000, and some say 1e30


@dataclass(frozen=True)
class Batch:
    """A batch of n examples.

    ``inputs``: pixel_values, float32 [n, c, h, w]; or input_ids and attention_mask, int64 [n, length].
    ``labels``: classes, int64 [n]; for causal_lm int64 [n, length], aligned with input_ids (the loss shifts
    them by one) and ``IGNORED`` where a token is not scored. ``bytes``: for causal_lm the UTF-8 bytes of the
    text that each window scores, int64 [n]; else None. ``stream``: where the examples are from.
    """

    ids: list[str]
    inputs: dict[str, Tensor]
    labels: Tensor
    bytes: Tensor | None
    stream: str = TRAIN


class Images(Dataset[Item]):
    """Examples with an image, which is processed on access; small sets stay in memory afterwards."""

    def __init__(self, rows: Sequence[Example], processor: Any) -> None:
        self.rows, self.processor = rows, processor
        self._cache: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[int] | None:
        """The class of each example."""
        return [row["label"] for row in self.rows]

    def __getitem__(self, i: int) -> Item:
        if i in self._cache:
            return self._cache[i]
        row = self.rows[i]
        pixels = self.process(row["image"])
        item = {"id": row["id"], "pixel_values": pixels, "label": row["label"]}
        if pixels.numel() * 4 * len(self) <= CACHED_BYTES:
            self._cache[i] = item
        return item

    def process(self, image: Any) -> Tensor:
        """Return the pixels of an image as the model takes them, float32 [c, h, w]."""
        processed = self.processor(images=image.convert("RGB"), return_tensors="pt")
        pixels: Tensor = processed["pixel_values"][0]
        return pixels


class Tokens(Dataset[Item]):
    """Items that need no further processing: texts that have been tokenized."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> list[int] | None:
        """The class of each item; None for a language model."""
        if "label" not in self.items[0]:
            return None
        return [item["label"] for item in self.items]

    def __getitem__(self, i: int) -> Item:
        return self.items[i]


def encode_texts(rows: Sequence[Example], tokenizer: Any, length: int) -> list[Item]:
    """Return one item per example, cut to ``length`` tokens; ``collate`` pads them."""
    rows = list(rows)
    if not rows:
        return []
    texts = [row["text"] for row in rows]
    coded = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    items = []
    for row, tokens in zip(rows, coded, strict=True):
        item = {"id": row["id"], "input_ids": tokens, "label": row["label"], "pad": tokenizer.pad_token_id}
        items.append(item)
    return items


def cut_windows(row: Example, tokenizer: Any, length: int) -> list[Item]:
    """Cut a text into windows of at most ``length`` tokens that together score every byte once.

    Each window begins with the start token. Its bytes reach from its first token to the first token of the
    next window, so the bytes of all windows add up to the text.
    """
    text, start = row["text"], find_start_token(tokenizer)
    coded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids, offsets = coded["input_ids"], coded["offset_mapping"]
    bytes_before = [0, *accumulate(len(char.encode()) for char in text)]  # UTF-8 bytes before each character
    items = []
    begin = 0
    for number, left in enumerate(range(0, len(ids), length - 1)):
        right = left + length - 1
        end = bytes_before[-1]
        if right < len(ids):
            first_character, _ = offsets[right]
            end = bytes_before[first_character]
        window = [start, *ids[left:right]]
        items.append({"id": f"{row['id']}#{number}", "input_ids": window, "bytes": end - begin, "pad": start})
        begin = end
    return items


def find_start_token(tokenizer: Any) -> int:
    """Return the token that stands before the first one of a text: bos, or else eos."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        "The model's tokenizer has neither a bos nor an eos token, and a text for a language model must "
        "start with one. Set one in the model's tokenizer_config.json."
    )


def choose_length(wanted: int | None, tokenizer: Any) -> int:
    """Return the tokens of an example: ``wanted``, or else the tokenizer's limit, at most ``LONGEST``."""
    limit = int(tokenizer.model_max_length)
    if wanted is None:
        return min(limit, LONGEST)
    if wanted > limit:
        raise ConfigError(
            f"dataset.length={wanted} is more than the {limit} tokens that the model's tokenizer allows. "
            f"Lower it to at most {limit}."
        )
    return wanted


def encode(raw: Raw, processor: Any, length: int | None = None) -> dict[str, Images | Tokens]:
    """Return the splits of ``raw`` as items for ``collate``.

    ``length`` overrides the data set's own number of tokens of an example. Raises ``ConfigError`` if that is
    more than the tokenizer allows, or if a split for a language model has no text.
    """
    if raw.task == "image_classification":
        return {split: Images(rows, processor) for split, rows in raw.splits.items()}
    size = choose_length(length or raw.length, processor)
    found: dict[str, Images | Tokens] = {}
    faults = []
    for split, rows in raw.splits.items():
        if raw.task == "sequence_classification":
            items = encode_texts(rows, processor, size)
        else:
            items = []
            for row in rows:
                items += cut_windows(row, processor, size)
            if not items:
                faults.append(f"The {split} split of the data set holds no text. Give one that has some.")
        found[split] = Tokens(items)
    if faults:
        raise ConfigError(*faults)
    return found


def collate(items: Sequence[Item]) -> Batch:
    """Return a batch of items; tokens are padded on the right to the longest item."""
    ids = [item["id"] for item in items]
    if "input_ids" in items[0]:
        inputs = pad(items)
    else:
        inputs = {"pixel_values": torch.stack([item["pixel_values"] for item in items])}
    if "label" in items[0]:
        return Batch(ids, inputs, torch.tensor([item["label"] for item in items]), None)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    labels[:, 0] = IGNORED  # the start token
    return Batch(ids, inputs, labels, torch.tensor([item["bytes"] for item in items]))


def pad(items: Sequence[Item]) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, int64 [n, longest]."""
    longest = max(len(item["input_ids"]) for item in items)
    ids, mask = [], []
    for item in items:
        length = len(item["input_ids"])
        ids.append(item["input_ids"] + [item["pad"]] * (longest - length))
        mask.append([1] * length + [0] * (longest - length))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
