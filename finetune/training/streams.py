"""Read the data streams of a run: the data sets that an objective uses beside the training data."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any, Literal

from ..config.settings import Config
from ..data.dataset import Raw
from ..data.encode import TRAIN, Images, Tokens, encode
from ..errors import ConfigError

LABELS_SHOWN = 5  # of a data set, in a message


def read_streams(config: Config, main: Raw, processor: Any) -> tuple[dict[str, Images | Tokens], list[str]]:
    """Return the training split of each data stream, encoded, and the notes on them.

    ``main``: the data set itself. Raises ``ConfigError`` with every fault: of a stream that cannot be read,
    has another task or other labels, or is too small for one batch.
    """
    found: dict[str, Images | Tokens] = {}
    notes: list[str] = []
    faults: list[str] = []
    for name, dataset in config.streams.items():
        key = f"streams.{name}"
        try:
            raw = dataset.read()
            wrong = _find_misfit(key, raw, main)
            if not wrong:
                found[name] = encode(replace(raw, splits={TRAIN: raw.splits[TRAIN]}), processor)[TRAIN]
                wrong = _find_shortage(key, len(found[name]), config.train.batch_size)
        except ConfigError as error:
            faults += [f"{key}: {_rename(fault, dataset, key)}" for fault in error.faults]
            continue
        if wrong:
            faults.append(wrong)
        notes += [f"{key}: {_rename(note, dataset, key)}" for note in raw.notes]
    if faults:
        raise ConfigError(*faults)
    return found, notes


def _rename(text: str, dataset: Any, key: str) -> str:
    """Return a message of a data set with its settings named as those of the stream ``key``."""
    names = "|".join(item.name for item in fields(dataset))
    return re.sub(rf"(?<![\w/.-])dataset\.({names})\b", rf"{key}.\1", text)


def _find_misfit(key: str, raw: Raw, main: Raw) -> str:
    """Return why a stream's task or labels are not those of the data set; "" if they are."""
    if raw.task != main.task:
        return (
            f"{key} is data for {raw.task}, and the data set is for {main.task}. Give it data of the same "
            f"task, or set {key}.task."
        )
    if raw.labels != main.labels:
        return (
            f"{key} has the labels {_list(raw.labels)}, and the data set has {_list(main.labels)}. Give it "
            "data with the same labels."
        )
    return ""


def _list(labels: tuple[str, ...]) -> str:
    more = ", ..." if len(labels) > LABELS_SHOWN else ""
    return ", ".join(labels[:LABELS_SHOWN]) + more


def _find_shortage(key: str, size: int, batch_size: int | Literal["auto"]) -> str:
    """Return a fault if a stream has too few examples for a batch; ``auto`` chooses a batch that fits."""
    if batch_size == "auto" or size >= batch_size:
        return ""
    return (
        f"{key} has {size} training examples, fewer than one batch of train.batch_size={batch_size}. Lower "
        f"train.batch_size to at most {size}, or give the stream more data."
    )
