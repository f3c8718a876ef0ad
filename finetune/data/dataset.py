"""The interface of a data set: a frozen dataclass of settings whose ``read`` returns examples by split.

Modules that register data sets must not import heavy packages at the top, because checking a configuration
imports them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Task = Literal["image_classification", "sequence_classification", "causal_lm"]
Example = dict[str, Any]  # "id": str; "image": PIL.Image or "text": str; unless causal_lm, "label": int


@dataclass(frozen=True)
class Raw:
    """The examples of a data set, before any processing.

    ``splits``: train, val, test and, optionally, retention. ``length``: the number of tokens in an example;
    None takes the tokenizer's limit. ``notes``: sentences for the user.
    """

    task: Task
    labels: tuple[str, ...]
    splits: Mapping[str, Sequence[Example]]
    notes: list[str] = field(default_factory=list)
    length: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Base of all data sets."""

    KIND: ClassVar[str] = "dataset"
    name: ClassVar[str]

    def faults(self, steps: int) -> list[str]:
        """Return why the settings make no sense in a run of ``steps`` steps, one sentence for each fault."""
        return []

    def read(self) -> Raw:
        """Return the examples of all splits, the same ones at every call.

        Raises ``ConfigError`` with every fault that is found.
        """
        raise NotImplementedError
