"""The masks of a pruned model: ``finetune/masks.safetensors`` beside the weights.

For each pruned matrix the file has one tensor of bytes, U8 [rows, columns / 8 rounded up], under the name
that the matrix has in the folder's weights and in its layout there. A bit says of one entry whether it is
live (1) or pruned and 0 for good (0). The first entry of a row is the highest bit of its first byte, and
unused bits are 0. A matrix without a mask is not pruned. ``finetune/manifest.json`` lists the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.settings import ModelConfig
from ..core.roles import is_matrix
from ..core.zeros import hold_zeros, layers_with_zeros, stored_mask
from ..errors import ConfigError
from ..system import safe
from .folder import list_weight_files
from .stored import match_names

FILE, MANIFEST = "finetune/masks.safetensors", "finetune/manifest.json"
OR_FREE = ", or set model.zeros=free, which lets every entry change"


def packed_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the mask of a matrix of this shape."""
    rows, columns = shape
    return rows, -(-columns // 8)


def pack_mask(pruned: Tensor) -> Tensor:
    """Return the mask of a matrix, uint8, from which of its entries are pruned, [rows, columns] bool."""
    import numpy as np

    return torch.from_numpy(np.packbits(~pruned.cpu().numpy(), axis=1))


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """Return which entries are pruned, [rows, columns] bool. Raises ``ValueError`` for unused bits of 1."""
    import numpy as np

    bits = np.unpackbits(packed.numpy(), axis=1)
    if bits[:, columns:].any():
        raise ValueError("it has bits of 1 behind the end of a row")
    return torch.from_numpy(bits[:, :columns] == 0)


def find_masks(folder: Path, config: ModelConfig) -> Path | None:
    """Return the file of masks of a model's folder, checked against its weights; None if it has none.

    Raises ``ConfigError`` if it is lost or damaged, or does not belong to these weights.
    """
    file = folder / FILE
    try:
        listed = _read_manifest(folder)
        if not file.exists():
            if listed:
                raise ValueError("finetune/manifest.json lists it, and it is missing")
            return None
        if listed and _sha256(file) != listed.get("sha256"):
            raise ValueError("its SHA-256 is not that of finetune/manifest.json")
        _check_fits(safe.read_tensor_header(file), _read_weight_shapes(folder, config))
    except (OSError, ValueError) as error:
        raise refuse_masks(config, error) from None
    return file


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    """Return what the manifest of the folder says of the masks; empty if nothing."""
    if not (folder / MANIFEST).exists():
        return {}
    content = safe.read_json(folder / MANIFEST, {"files": {str: {str: object}}})
    entry: Mapping[str, Any] = content["files"].get(Path(FILE).name, {})
    return entry


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read_weight_shapes(folder: Path, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stored tensor of the model."""
    shapes = {}
    for weights in list_weight_files(folder, config):
        for name, (_, shape) in safe.read_tensor_header(weights).items():
            shapes[name] = shape
    return shapes


def _check_fits(masks: safe.Header, weights: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` for the first mask that cannot be one of these weights."""
    for name, (dtype, shape) in masks.items():
        weight = weights.get(name)
        if weight is None:
            raise ValueError(f"it has a mask of {name[:80]!r}, and the weights have no such tensor")
        if len(weight) != 2 or dtype != "U8" or shape != packed_shape(weight):
            raise ValueError(
                f"its mask of {name[:80]!r} is {dtype} of shape {list(shape)}, and the weight has the shape "
                f"{list(weight)}"
            )


def refuse_masks(config: ModelConfig, reason: object) -> ConfigError:
    """Return the error for masks that cannot be used."""
    return ConfigError(
        f"model.path={config.path}: {FILE} cannot be used: {reason}. Copy the folder again from where it was "
        f"made{OR_FREE}."
    )


def hold_stored_zeros(folder: Path, config: ModelConfig, model: nn.Module) -> str | None:
    """Hold the entries of ``model`` at 0 that the masks of its folder name; return a note for the user.

    None if the folder has no masks. Raises ``ConfigError`` if they do not fit the model: an unknown layer,
    another shape, or an entry that is not 0.
    """
    file = find_masks(folder, config)
    if file is None:
        if config.zeros == "keep":
            raise ConfigError(
                f"model.zeros=keep: model.path={config.path} has no {FILE}, so no entry of it is known to be "
                "pruned. Prune it with `finetune prune`, or leave model.zeros out."
            )
        return None
    stored = match_names(model, _read_weight_shapes(folder, config))
    own = {name: parameter for parameter, name in stored.items()}
    held = size = layers = 0
    try:
        with safe_open(file, "pt") as masks:
            for name in masks.keys():  # noqa: SIM118  (it is no mapping)
                layer = _find_layer(model, own.get(name, ""), name)
                pruned = unpack_mask(masks.get_tensor(name), layer.get_parameter("weight").shape[1])
                size += pruned.numel()
                if not pruned.any():
                    continue
                try:
                    hold_zeros(layer, pruned)
                except ValueError as error:
                    raise ValueError(f"it is not of these weights ({name[:80]}: {error})") from None
                held, layers = held + int(pruned.sum()), layers + 1
    except (OSError, ValueError, SafetensorError) as error:
        raise refuse_masks(config, error) from None
    if not held:
        return None
    return (
        f"{held:,} pruned entries of {layers} layers stay 0, {held / size:.1%} of the masked ones "
        "(model.zeros=free lets them change)."
    )


def _find_layer(model: nn.Module, parameter: str, name: str) -> nn.Module:
    """Return the layer whose weight is stored under ``name``; raise ``ValueError`` if there is none."""
    layer, _, leaf = parameter.rpartition(".")
    if leaf != "weight" or not is_matrix(model.get_submodule(layer)):
        raise ValueError(f"its mask of {name[:80]!r} belongs to no linear layer of this model")
    return model.get_submodule(layer)


def write_masks(model: nn.Module, folder: Path, config: ModelConfig) -> bool:
    """Write the masks of a plain model into the folder that its weights were saved in; tell if there are any.

    The caller writes the manifest.
    """
    stored = match_names(model, _read_weight_shapes(folder, config))
    masks = {}
    for name, layer in layers_with_zeros(model):
        pruned = stored_mask(layer)
        assert pruned is not None
        masks[stored[f"{name}.weight"]] = pack_mask(pruned)
    if masks:
        (folder / FILE).parent.mkdir(exist_ok=True)
        save_file(masks, folder / FILE)
    return bool(masks)
