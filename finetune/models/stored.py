"""Read the parameters of a model one by one from its checkpoint, without a second model in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..config.settings import ModelConfig
from ..system import safe
from .folder import list_weight_files


class StoredParameters:
    """The parameters of a checkpoint that stores each one under the model's name for it and in its shape.

    ``new``: the values of the parameters that the checkpoint lacks, by name. All values have ``dtype``.
    """

    def __init__(self, files: Mapping[str, Path], new: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.files, self.new, self.dtype = files, new, dtype

    def read(self, name: str) -> Tensor:
        """Read one parameter."""
        if name in self.new:
            return self.new[name]
        with safe_open(self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.to(self.dtype)


def find_stored(
    folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], new: Mapping[str, Tensor]
) -> StoredParameters | None:
    """Return the stored parameters of a model with these ``shapes`` by name.

    Returns None if the checkpoint lacks one that is not in ``new``, or stores it in another shape.
    """
    files: dict[str, Path] = {}
    for file in list_weight_files(folder, config):
        for name, (_, shape) in safe.read_tensor_header(file).items():
            if shapes.get(name) == tuple(shape):
                files[name] = file
    if any(name not in files and name not in new for name in shapes):
        return None
    return StoredParameters(files, new, getattr(torch, config.dtype))


def match_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return the stored name of each tensor of a model by its name in the model.

    transformers renames the tensors of some architectures when it loads them. Tensors that it assembles from
    several stored ones are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings, others = list[Any](), list[Any]()
    for conversion in get_model_conversion_mapping(model):
        kind = renamings if isinstance(conversion, WeightRenaming) else others
        kind.append(conversion)
    tensors, found = model.state_dict(), dict[str, str]()
    for name in sorted(stored):
        own, converted = rename_source_key(name, renamings, others, model.base_model_prefix, tensors)
        if converted is None and own in tensors:
            found[own] = name
    return found


def name_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with the names that they have in the model without patched layers."""
    for name, parameter in model.named_parameters():
        yield name.replace(".base.", "."), parameter


def fingerprint(model: nn.Module, skip: Collection[str]) -> str:
    """Return the SHA-256 (hex) of the names, shapes, dtypes and bytes of all parameters but ``skip``.

    The parameters are sorted by name. Patched layers do not change the result.
    """
    parameters = dict(name_parameters(model))
    return hash_parameters(parameters, parameters.__getitem__, skip)


def hash_parameters(names: Iterable[str], read: Callable[[str], Tensor], skip: Collection[str]) -> str:
    """Return what ``fingerprint`` returns for the parameters ``names``; ``read`` returns one by name."""
    total = hashlib.sha256()
    for name in sorted(names):
        if name not in skip:
            parameter = read(name).detach()
            data: Any = parameter.cpu().contiguous().flatten().view(torch.uint8).numpy()
            total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            total.update(data)
    return total.hexdigest()
