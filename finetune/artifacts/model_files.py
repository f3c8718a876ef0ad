"""Open the files of a stored model, and take the fingerprint of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config.settings import ModelConfig
from ..models.folder import check_weights, find_folder, list_weight_files, refuse_foreign_code
from ..models.stored import hash_parameters
from ..storage.tensor_file import TensorFile


def open_files(model: str) -> tuple[Path, ModelConfig, list[TensorFile]]:
    """Return the folder of a model, how it is named in a configuration, and its checked files of weights."""
    config = ModelConfig("hf", model)
    folder, _ = find_folder(config)
    refuse_foreign_code(folder, config)
    check_weights(folder, config)
    return folder, config, [TensorFile(file) for file in list_weight_files(folder, config)]


def fingerprint_files(files: Sequence[TensorFile]) -> str:
    """Return the SHA-256 (hex) of the names, shapes, dtypes and bytes of all tensors, read one by one."""
    file_of = {name: file for file in files for name in file.names}
    return hash_parameters(file_of, lambda name: file_of[name].read(name), ())
