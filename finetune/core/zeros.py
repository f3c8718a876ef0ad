"""Zeros that stay: which entries of a pruned weight are held at 0 while a model is trained.

They are never inferred from ``weight == 0``: a pass that prunes says which entries it set to 0, and the mask
travels with the model. Layers, banks and parameters trained in place read it here. The other entries are
called live.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .roles import is_transposed

BUFFER, COUNT = "pruned_entries", "pruned_count"


def hold_zeros(layer: nn.Module, pruned: Tensor) -> None:
    """Hold the entries of the layer's weight at 0 where ``pruned``, bool, of the weight's shape, is true.

    Raises ``ValueError`` if one of them is not 0 now, unless the weight has no values, and if the shapes
    differ.
    """
    weight = layer.get_parameter("weight")
    if pruned.shape != weight.shape or pruned.dtype != torch.bool:
        raise ValueError(f"a mask of shape {list(pruned.shape)} for a weight of shape {list(weight.shape)}")
    wrong = 0 if weight.is_meta else int(weight.detach()[pruned].count_nonzero())
    if wrong:
        raise ValueError(f"{wrong:,} entries that it prunes are not 0")
    layer.register_buffer(BUFFER, pruned, persistent=False)  # on the layer's device, and in none of its files
    setattr(layer, COUNT, int(pruned.sum()))


def stored_mask(layer: nn.Module) -> Tensor | None:
    """Return which entries of the layer's weight are held at 0, in the weight's own layout; None: none."""
    return layer._buffers.get(BUFFER)


def find_pruned(layer: nn.Module) -> Tensor | None:
    """Return which entries of a linear layer's weight are held at 0, [out, in] bool; None: none are."""
    mask = stored_mask(layer)
    return mask.T if mask is not None and is_transposed(layer) else mask


def count_pruned(layer: nn.Module) -> int:
    """Count the entries of the layer's weight that are held at 0."""
    count: int = getattr(layer, COUNT, 0)
    return count


def share_of_zeros(model: nn.Module) -> float | None:
    """Return the share of entries that are held at 0, among those of the layers that have any; None: none."""
    held = size = 0
    for _, layer in layers_with_zeros(model):
        held += count_pruned(layer)
        size += layer.get_parameter("weight").numel()
    return held / size if size else None


def layers_with_zeros(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose weights have entries that are held at 0, by name without patched layers."""
    for name, module in model.named_modules():
        if stored_mask(module) is not None:
            yield name.removesuffix(".base"), module


def fingerprint_zeros(model: nn.Module) -> str | None:
    """Return the SHA-256 (hex) of names, shapes and values of all masks; None if there is none."""
    total = hashlib.sha256()
    found = False
    for name, layer in sorted(layers_with_zeros(model), key=lambda pair: pair[0]):
        mask = stored_mask(layer)
        assert mask is not None
        total.update(f"{name} {tuple(mask.shape)}\n".encode())
        total.update(mask.cpu().contiguous().numpy().tobytes())
        found = True
    return total.hexdigest() if found else None


def describe_zeros(model: nn.Module) -> dict[str, str]:
    """Return what the description of a trained change says of the entries that are held at 0."""
    mark = fingerprint_zeros(model)
    return {} if mark is None else {"zeros": mark}


@torch.no_grad()
def settle_zeros(model: nn.Module) -> None:
    """Raise ``ConfigError`` if an entry that is held at 0 is not 0 in the weights of a plain model.

    An entry of -0.0, which a negative factor makes, becomes 0.0.
    """
    lost = find_lost_zeros(model)
    if lost:
        raise ConfigError(
            f"{lost}, though they are kept: the method writes to them. Set model.zeros=free, which lets "
            "every entry change."
        )
    for _, layer in layers_with_zeros(model):
        mask = stored_mask(layer)
        assert mask is not None
        layer.get_parameter("weight").masked_fill_(mask, 0)


@torch.no_grad()
def find_lost_zeros(model: nn.Module) -> str:
    """Return, as a clause, which entries that are held at 0 are not 0 in the weights; empty if all are."""
    for name, layer in layers_with_zeros(model):
        changed = int(layer.get_parameter("weight")[stored_mask(layer)].count_nonzero())
        if changed:
            return f"{changed:,} pruned entries of {name} are not 0 any more"
    return ""
