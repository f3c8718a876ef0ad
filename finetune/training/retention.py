"""Measure what an image classifier forgets, by the answers of its pretrained head before and after training.

For the evaluation, the head that the checkpoint came with replaces the new head on the tuned body. The images
are unlike those of the task. They need no labels: the answers before training serve as labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..models.folder import find_folder, list_weight_files
from ..models.load import Base


def pretrained_head(base: Base) -> dict[str, Tensor] | None:
    """Read the head's parameters from the checkpoint, by name; ``None`` if it has no such head."""
    if base.reload_args is None or base.reload_args[0].init == "random":
        return None
    config, found = base.reload_args[0], dict[str, Tensor]()
    for file in list_weight_files(find_folder(config)[0], config):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (safetensors' handle is not a mapping)
                if name in base.head:
                    found[name] = stored.get_tensor(name).to(base.model.dtype)
    return found if set(found) == set(base.head) else None


@contextmanager
def with_head(model: nn.Module, head: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``head``, which may have another number of classes, into the model for the length of the block."""
    device = next(model.parameters()).device
    replaced: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for name, tensor in head.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        replaced.append((owner, leaf, owner._parameters[leaf]))
        owner._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for owner, leaf, parameter in replaced:
            owner._parameters[leaf] = parameter
