"""What a data set is: a frozen dataclass of where it lies, whose ``read`` gives raw rows by split.

Modules with registered data sets import nothing heavy at the top: they are imported to check a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Task = Literal["image_classification", "sequence_classification", "causal_lm"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Raw:
    """Rows as they were read, before any processor.

    A row is ``{"id": str, "image": PIL.Image | "text": str, "label": int}``; a language-model row has no label. ``splits`` holds
    train, val and test, and for language models perhaps retention. ``length`` is the number of tokens asked for; None: the tokenizer's.
    """

    task: Task
    labels: tuple[str, ...]
    splits: Mapping[str, Sequence[Row]]
    notes: list[str] = field(default_factory=list)
    length: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Base of all data sets."""

    KIND: ClassVar[str] = "dataset"
    name: ClassVar[str]

    def read(self) -> Raw:
        """The rows of all splits, always the same ones. Raises ``ConfigError`` with every fault that is found."""
        raise NotImplementedError
