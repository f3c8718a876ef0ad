"""Open the files of a stored model, and take the fingerprint of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.settings import ModelConfig
from ..models.folder import check_weights, find_folder, list_weight_files, refuse_foreign_code
from ..models.masks import find_masks
from ..models.stored import hash_parameters, match_names
from ..storage.tensor_file import TensorFile


def open_files(model: str) -> tuple[Path, ModelConfig, list[TensorFile]]:
    """Return the folder of a model, how it is named in a configuration, and its checked files of weights."""
    config = ModelConfig("hf", model)
    folder, _ = find_folder(config)
    refuse_foreign_code(folder, config)
    check_weights(folder, config)
    find_masks(folder, config)
    return folder, config, [TensorFile(file) for file in list_weight_files(folder, config)]


def map_files(files: Sequence[TensorFile]) -> dict[str, TensorFile]:
    """Return the file of each tensor by the tensor's name."""
    file_of: dict[str, TensorFile] = {}
    for file in files:
        file_of |= dict.fromkeys(file.names, file)
    return file_of


def fingerprint_files(files: Sequence[TensorFile]) -> str:
    """Return the SHA-256 (hex) of the names, shapes, dtypes and bytes of all tensors, read one by one."""
    file_of = map_files(files)
    return hash_parameters(file_of, lambda name: file_of[name].read(name), ())


class StoredModel:
    """A model folder whose tensors are read by the names that they have in the model."""

    def __init__(self, folder: Path, files: Sequence[TensorFile], model: Any) -> None:
        self.folder, self.model = folder, model
        self.file_of = map_files(files)
        self.stored = match_names(model, self.file_of)
        self.fingerprint = cache(self._fingerprint)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in the model."""
        stored = self.stored[name]
        return self.file_of[stored].read(stored)

    def has(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor of the model has these values."""
        if name not in self.stored:
            return False
        mine = self.read(name)
        return mine.shape == tensor.shape and torch.equal(mine.double(), tensor.double())

    def _fingerprint(self, names: tuple[str, ...], dtype: torch.dtype) -> str | None:
        """Return the fingerprint of these parameters in ``dtype``; None if the folder lacks one."""
        if not self.stored.keys() >= set(names):
            return None
        return hash_parameters(names, lambda name: self.read(name).to(dtype), ())
