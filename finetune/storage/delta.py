"""The trained change on disk: ``delta.safetensors`` and ``delta.json``, and nothing of the base."""

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
from ..system.disk import writing
from . import manifest
from .run_folder import write_json_atomic

ABOUT = {
    "format": int, "method": str, "config": {}, "task": str, "labels": [str], "head": [str], "step": int, "phase?": int, "base_fingerprint": str,
}  # fmt: skip


def tensors(states: nn.Module) -> dict[str, Tensor]:
    """Everything of ``states`` that is stored, by name; some modules in their packed form."""
    packed = packed_modules(states)
    plain = {k: v.detach() for k, v in states.state_dict().items() if not k.startswith(tuple(packed))}
    return plain | {prefix + key: t for prefix, module in packed.items() for key, t in module.pack().items()}


def stored_bytes(states: nn.Module) -> int:
    """Bytes of the tensors that ``save`` would write."""
    return sum(t.numel() * t.element_size() for t in tensors(states).values())


def save(folder: Path, states: nn.Module, about: dict[str, Any]) -> None:
    """Write the change, what it belongs to, and their manifest; the folder appears whole or not at all."""
    with manifest.sealing(folder) as temporary:
        with writing(temporary / "delta.safetensors"):
            save_file(
                {k: v.cpu().contiguous() for k, v in tensors(states).items()}, temporary / "delta.safetensors"
            )
        write_json_atomic(temporary / "delta.json", {**manifest.HEADER, **about})


def about(folder: Path) -> dict[str, Any]:
    """The content of ``delta.json``; raises ``ConfigError`` where it is missing, damaged or of a later format."""
    file = folder / "delta.json"
    try:
        content: Any = safe.read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}). Give the folder of a run that has stored its change."
        ) from error
    if newer := safe.too_new(file, content):
        raise ConfigError(f"{newer}.")
    if fault := safe.differs(content, ABOUT):
        raise ConfigError(
            f"{file} does not say what a change belongs to ({fault}). Give the folder of a run that has stored its change."
        )
    found: dict[str, Any] = content
    return found


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises ``ConfigError`` where it is missing or damaged."""
    try:
        safe.tensors_of(file)
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{file} is missing, damaged or cut short ({error}). Copy it again from where it was made, or train again."
        ) from error


@torch.no_grad()
def load(folder: Path, states: nn.Module) -> None:
    """Put the stored change into ``states`` as ``build`` made them. Raises ``ConfigError`` where it is damaged or belongs to something else."""
    manifest.check(folder)
    file = folder / "delta.safetensors"
    stored = read(file)
    packed = packed_modules(states)
    names = {prefix: list(module.pack()) for prefix, module in packed.items()}
    own = {k: v for k, v in states.state_dict().items() if not k.startswith(tuple(packed))}
    wanted = {k: tuple(v.shape) for k, v in own.items()} | {
        f"{prefix}{k}": None for prefix in packed for k in names[prefix]
    }
    wrong = sorted(wanted.keys() ^ stored.keys()) or [
        k for k, shape in wanted.items() if shape is not None and shape != tuple(stored[k].shape)
    ]
    if wrong:
        raise ConfigError(
            f"{file} does not belong to this method and model: {len(wrong)} entries differ (first: {wrong[0]}). Use the run's own config.yaml."
        )
    if wild := [k for k, t in stored.items() if not t.isfinite().all()]:
        raise ConfigError(
            f"{file} holds numbers that are not finite (first: {wild[0]}). Copy it again from where it was made, or train again."
        )
    try:
        for prefix, module in packed.items():
            module.unpack({k: stored.pop(prefix + k) for k in names[prefix]})
        states.load_state_dict(stored, strict=False)
    except (
        ConfigError,
        ValueError,
        TypeError,
        RuntimeError,
        IndexError,
    ) as error:  # of tensors of another kind than ``pack`` gives
        raise ConfigError(
            f"{file} does not belong to this method and model ({error}). Use the run's own config.yaml."
        ) from error
