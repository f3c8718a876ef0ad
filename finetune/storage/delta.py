"""Store the trained change: ``delta.safetensors`` and ``delta.json``, without any tensor of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.state import packed_modules
from ..errors import ConfigError
from ..system import safe
from ..system.disk import safetensors_errors_as_os_errors
from . import manifest
from .atomic import write_json_atomic

DESCRIPTION_SCHEMA = {
    "format": int,
    "method": str,
    "config": {},
    "task": str,
    "labels": [str],
    "head": [str],
    "step": int,
    "phase?": int,
    "base_fingerprint": str,
    "zeros?": str,
}


def tensors_to_store(states: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of ``states`` that is stored, by name: packed ones in their packed form."""
    packed = packed_modules(states)
    found = {}
    for name, tensor in states.state_dict().items():
        if not name.startswith(tuple(packed)):
            found[name] = tensor.detach()
    for prefix, module in packed.items():
        for name, tensor in module.pack().items():
            found[prefix + name] = tensor
    return found


def stored_bytes(states: nn.Module) -> int:
    """Return the bytes of all tensors that ``save_delta`` would write."""
    return sum(t.numel() * t.element_size() for t in tensors_to_store(states).values())


def save_delta(folder: Path, states: nn.Module, description: dict[str, Any]) -> None:
    """Write the change, the description of what it belongs to, and their manifest.

    The folder appears whole or not at all.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_to_store(states).items()}
    with manifest.sealed_folder(folder) as temporary:
        file = temporary / "delta.safetensors"
        with safetensors_errors_as_os_errors(file):
            save_file(tensors, file)
        write_json_atomic(temporary / "delta.json", {**manifest.HEADER, **description})


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of ``delta.json``.

    Raises ``ConfigError`` if it is missing, damaged or of a later format.
    """
    file = folder / "delta.json"
    cure = "Give the folder of a run that has stored its change."
    try:
        content: Any = safe.read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}). {cure}") from error
    if newer := safe.explain_newer_format(file, content):
        raise ConfigError(f"{newer}.")
    if fault := safe.find_mismatch(content, DESCRIPTION_SCHEMA):
        raise ConfigError(f"{file} does not describe a stored change ({fault}). {cure}")
    found: dict[str, Any] = content
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises ``ConfigError`` if it is missing or damaged."""
    try:
        safe.read_tensor_header(file)
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{file} is missing, damaged or cut short ({error}). "
            "Copy it again from where it was made, or train again."
        ) from error


@torch.no_grad()
def load_delta(folder: Path, states: nn.Module) -> None:
    """Put the stored change into ``states``, which ``build`` made for the same method and model.

    Raises ``ConfigError`` if the folder is damaged, its tensors have other names or shapes, or a number is
    not finite.
    """
    manifest.check(folder)
    file = folder / "delta.safetensors"
    stored = read_tensors(file)
    packed = packed_modules(states)
    packed_names = {prefix: list(module.pack()) for prefix, module in packed.items()}
    _check_tensors(file, stored, _wanted_shapes(states, packed_names))
    try:
        for prefix, module in packed.items():
            module.unpack({name: stored.pop(prefix + name) for name in packed_names[prefix]})
        states.load_state_dict(stored, strict=False)
    except (ConfigError, ValueError, TypeError, RuntimeError, IndexError) as error:  # tensors of other types
        raise ConfigError(
            f"{file} does not belong to this method and model ({error}). Use the run's own config.yaml."
        ) from error


def _wanted_shapes(
    states: nn.Module, packed_names: dict[str, list[str]]
) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of every tensor that must be stored; ``None`` for packed ones, whose size is free."""
    wanted: dict[str, tuple[int, ...] | None] = {}
    for name, tensor in states.state_dict().items():
        if not name.startswith(tuple(packed_names)):
            wanted[name] = tuple(tensor.shape)
    for prefix, names in packed_names.items():
        for name in names:
            wanted[prefix + name] = None
    return wanted


def _check_tensors(file: Path, stored: dict[str, Tensor], wanted: dict[str, tuple[int, ...] | None]) -> None:
    wrong = sorted(wanted.keys() ^ stored.keys())
    if not wrong:
        for name, shape in wanted.items():
            if shape is not None and shape != tuple(stored[name].shape):
                wrong.append(name)
    if wrong:
        raise ConfigError(
            f"{file} does not belong to this method and model: {len(wrong)} entries differ "
            f"(first: {wrong[0]}). Use the run's own config.yaml."
        )
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise ConfigError(
                f"{file} holds numbers that are not finite (first: {name}). "
                "Copy it again from where it was made, or train again."
            )
