"""Open the masks of a model folder beside its files of weights, without the model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config.settings import ModelConfig
from ..models.masks import find_masks, refuse_masks, unpack_mask
from ..storage.tensor_file import TensorFile


def open_masks(folder: Path, config: ModelConfig, files: Sequence[TensorFile]) -> TensorFile | None:
    """Return the masks of a model folder, or None if it has none.

    Raises ``ConfigError`` if they do not fit the weights, or an entry that is pruned is not 0 in them.
    """
    found = find_masks(folder, config)
    if found is None:
        return None
    masks = TensorFile(found)
    for file in files:
        for name in file.names:
            if name not in masks.names:
                continue
            weight = file.read(name)
            try:
                wrong = int(weight[unpack_mask(masks.read(name), weight.shape[1])].count_nonzero())
            except ValueError as error:
                raise refuse_masks(config, f"{error} ({name[:80]})") from None
            if wrong:
                raise refuse_masks(
                    config, f"it is not of these weights ({name[:80]}: {wrong:,} pruned entries are not 0)"
                )
    return masks
