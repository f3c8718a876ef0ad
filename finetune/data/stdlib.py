"""The running Python's standard library as a corpus for language models, and its prose as what should not be forgotten."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from ..errors import ConfigError
from ..registry import register
from .dataset import Dataset, Raw, Row

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
TENTHS = {
    "val": range(1),
    "test": range(1, 3),
    "train": range(3, 10),
}  # of all files, by the hash of their path
Bytes = Annotated[int, Ge(1)]


@register("stdlib")
@dataclass(frozen=True)
class Stdlib(Dataset):
    """Python's standard-library sources, split by file; retention on the English prose of pydoc's topics.

    Options:
        train_bytes: Bytes of text to train on.
        val_bytes: Bytes of text in the validation split.
        test_bytes: Bytes of text in the test split.
        retention_bytes: Bytes of prose that retention is measured on.
        length: Tokens in one example; ``null`` takes the limit of the tokenizer, at most 1,024.
    """

    train_bytes: Bytes = 1_000_000
    val_bytes: Bytes = 60_000
    test_bytes: Bytes = 120_000
    retention_bytes: Bytes = 60_000
    length: Annotated[int, Ge(2)] | None = None

    def read(self) -> Raw:
        from pydoc_data.topics import topics

        root = Path(sysconfig.get_paths()["stdlib"])
        names = {
            split: [name for name in sources(root) if share_of(name) in tenths]
            for split, tenths in TENTHS.items()
        }
        if not all(names.values()):
            cure = "Use a Python that was installed with its library's sources"
            raise ConfigError(
                f"dataset=stdlib found {sum(map(len, names.values()))} sources under {root}. {cure}."
            )
        splits = {
            split: take(documents(root, names[split]), getattr(self, f"{split}_bytes"))
            for split in ("train", "val", "test")
        }
        splits["retention"] = take(
            ((f"topics/{name}", text) for name, text in sorted(topics.items())), self.retention_bytes
        )
        short = [
            split
            for split, rows in splits.items()
            if sum(len(row["text"].encode()) for row in rows) < getattr(self, f"{split}_bytes")
        ]
        notes = [
            f"The standard library has less {split} text than dataset.{split}_bytes asks for; all of it is used."
            for split in short
        ]
        return Raw("causal_lm", (), splits, notes, self.length)


def sources(root: Path) -> list[str]:
    """Relative paths of the library's own Python files, in the order of their hashes."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED]
        found += [
            (Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")
        ]
    return sorted(found, key=_digest)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def share_of(name: str) -> int:
    """Which tenth of all files a path falls into, on every machine and Python the same."""
    return _digest(name) % 10


def documents(root: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """Name and text of each file that is UTF-8 and not empty."""
    for name in names:
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            yield name, text


def take(texts: Iterator[tuple[str, str]], size: int) -> list[Row]:
    """Rows of the first ``size`` bytes; the last text is cut, and loses a character that the cut goes through."""
    rows: list[Row] = []
    for name, text in texts:
        coded = text.encode()[:size]
        rows.append({"id": name, "text": coded.decode(errors="ignore")})
        size -= len(coded)
        if size <= 0:
            break
    return rows
