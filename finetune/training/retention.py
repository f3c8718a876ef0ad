"""What an image classifier should not forget: the answers of its pretrained head.

The head that the checkpoint came with is put back on the tuned body for a moment; what it says of images unlike the task's is compared with what it
said before training. No labels are needed, and the task's own head plays no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.folder import find, weight_files
from ..models.load import Base


def pretrained_head(base: Base) -> dict[str, Tensor] | None:
    """The head's parameters as the checkpoint has them, by name; None where it lacks one."""
    from safetensors import safe_open

    if base.reload_args is None:
        return None
    config, found = base.reload_args[0], dict[str, Tensor]()
    for file in weight_files(find(config)[0], config):
        with safe_open(file, "pt") as stored:
            there = set(stored.keys())
            for name in base.head:
                if name in there:
                    found[name] = stored.get_tensor(name).to(base.model.dtype)
    return found if set(found) == set(base.head) else None


@contextmanager
def wearing(model: nn.Module, head: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these parameters in place of its own; their number of classes may differ."""
    places = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], t) for name, t in head.items()
    ]
    own = [owner._parameters[leaf] for owner, leaf, _ in places]
    device = next(model.parameters()).device
    for owner, leaf, tensor in places:
        owner._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for (owner, leaf, _), parameter in zip(places, own, strict=True):
            owner._parameters[leaf] = parameter
