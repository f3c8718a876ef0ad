"""Read data sets of the Hugging Face hub, from the local cache unless downloading is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..registry import register
from .files import find_split, keep_images_encoded, quiet_datasets, sort_splits
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
        """Return the tables of the splits whose names are known, and notes."""
        import datasets

        if Path(self.path).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.path):
            raise ConfigError(
                f"dataset.path={self.path} is not the id of a data set on the hub. "
                "For files on this machine use dataset=csv, jsonl or parquet."
            )
        try:
            with quiet_datasets(), nullcontext() if self.download else block_requests():
                found = datasets.load_dataset(self.path, self.config, revision=self.revision)
        except Exception as error:  # missing, private, gated, unknown format, offline: different errors
            raise ConfigError(self._explain(error)) from error
        names: dict[str, str] = {}
        for name in found:
            split = find_split(name)
            if split:
                names.setdefault(split, name)
        if "train" not in names:
            raise ConfigError(
                f"dataset.path={self.path} has no train split. Its splits are: {', '.join(found)}. "
                "Choose another data set, or another dataset.config."
            )
        notes = [f"Left out: the split {name}." for name in found if name not in names.values()]
        sources = []
        for split, name in sort_splits(names):
            sources.append(Source(split, name, keep_images_encoded(found[name])))
        return sources, notes

    def _explain(self, error: Exception) -> str:
        """Return the message for an error of the library: its first line, and the cure."""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if self.download:
            return (
                f"dataset.path={self.path} could not be read from the hub ({reason}). "
                "Check the id, dataset.config and the network."
            )
        return (
            f"dataset.path={self.path} is not in the local cache of the hub ({reason}). "
            "Set dataset.download=true to fetch it."
        )


@contextmanager
def block_requests() -> Iterator[None]:
    """Stop ``datasets`` and ``huggingface_hub`` from sending requests inside the block.

    They read the environment variable for this only when they are imported, so the variables that they made
    from it are set directly.
    """
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
