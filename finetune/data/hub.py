"""Data sets of the Hugging Face hub, from the local cache unless downloading is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..registry import register
from .files import by_split, encoded_images, hushed, split_of
from .table import Source, Table


@register("hub")
@dataclass(frozen=True, kw_only=True)
class Hub(Table):
    """A data set of the Hugging Face hub by its id.

    Options:
        path: The id, as ``OWNER/NAME``.
        config: Configuration of the data set, if it has several.
        revision: Branch, tag or commit on the hub.
        download: Fetch the data set if it is not in the local cache.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    download: bool = False

    def sources(self) -> tuple[list[Source], list[str]]:
        import datasets

        if Path(self.path).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.path):
            raise ConfigError(
                f"dataset.path={self.path} is not the id of a data set on the hub. For files here use dataset=csv, jsonl or parquet."
            )
        try:
            with hushed(), nullcontext() if self.download else offline():
                found = datasets.load_dataset(self.path, self.config, revision=self.revision)
        except (
            Exception
        ) as error:  # missing, private, gated, of an unknown format, no network: each has its own exception
            raise ConfigError(self.fault(error)) from error
        splits = {split: name for name in reversed(list(found)) if (split := split_of(name))}
        if "train" not in splits:
            raise ConfigError(
                f"dataset.path={self.path} has no train split. Its splits are: {', '.join(found)}."
            )
        notes = [f"Left out: the split {name}." for name in found if name not in splits.values()]
        return [Source(split, name, encoded_images(found[name])) for split, name in by_split(splits)], notes

    def fault(self, error: Exception) -> str:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if self.download:
            return f"dataset.path={self.path} could not be read from the hub ({reason}). Check the id, dataset.config and the network."
        return f"dataset.path={self.path} is not in the local cache of the hub ({reason}). Set dataset.download=true to fetch it."


@contextmanager
def offline() -> Iterator[None]:
    """No request leaves this machine; both libraries read their switch at import, so it is turned in place."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
