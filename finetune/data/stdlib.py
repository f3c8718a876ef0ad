"""Read the running Python's standard library as a corpus for language models.

Its sources are the training data. The English prose of pydoc's topics is the retention data.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from ..errors import ConfigError
from ..registry import register
from .dataset import Dataset, Example, Raw

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
# The tenths of all files that each split gets.
TENTHS = {"val": range(1), "test": range(1, 3), "train": range(3, 10)}
Bytes = Annotated[int, Ge(1)]


@register("stdlib")
@dataclass(frozen=True)
class Stdlib(Dataset):
    """Python's standard-library sources, split by file; retention is measured on the prose of pydoc's topics.

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
        """Return as many texts as the options ask for, in an order that is the same on every machine."""
        from pydoc_data.topics import topics

        root = Path(sysconfig.get_paths()["stdlib"])
        names = _split_sources(root)
        if not all(names.values()):
            count = sum(map(len, names.values()))
            raise ConfigError(
                f"dataset=stdlib needs the sources of Python's library and found {count} files under {root}. "
                "Use a Python that was installed with its library's sources."
            )
        texts: dict[str, Iterable[tuple[str, str]]] = {}
        for split in ("train", "val", "test"):
            texts[split] = read_texts(root, names[split])
        texts["retention"] = [(f"topics/{name}", topics[name]) for name in sorted(topics)]
        splits, notes = {}, []
        for split, documents in texts.items():
            wanted = getattr(self, f"{split}_bytes")
            splits[split] = take_bytes(documents, wanted)
            if sum(len(example["text"].encode()) for example in splits[split]) < wanted:
                notes.append(
                    f"The standard library has less {split} text than dataset.{split}_bytes asks for; "
                    "all of it is used."
                )
        return Raw("causal_lm", (), splits, notes, self.length)


def _split_sources(root: Path) -> dict[str, list[str]]:
    """Return the source files of each split."""
    found: dict[str, list[str]] = {split: [] for split in TENTHS}
    for name in list_sources(root):
        for split, tenths in TENTHS.items():
            if find_tenth(name) in tenths:
                found[split].append(name)
    return found


def list_sources(root: Path) -> list[str]:
    """Return the relative paths of the library's own Python files, sorted by their hashes."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED]
        for file in files:
            if file.endswith(".py"):
                found.append((Path(folder) / file).relative_to(root).as_posix())
    return sorted(found, key=_hash_name)


def _hash_name(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def find_tenth(name: str) -> int:
    """Return the tenth of all files that a path belongs to, the same on every machine and Python."""
    return _hash_name(name) % 10


def read_texts(root: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each file that is UTF-8 and not empty."""
    for name in names:
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            yield name, text


def take_bytes(texts: Iterable[tuple[str, str]], size: int) -> list[Example]:
    """Return examples with the first ``size`` bytes of UTF-8; a character that is cut in two is dropped."""
    examples: list[Example] = []
    for name, text in texts:
        coded = text.encode()[:size]
        examples.append({"id": name, "text": coded.decode(errors="ignore")})
        size -= len(coded)
        if size <= 0:
            break
    return examples
