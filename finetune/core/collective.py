"""Agreement between processes; with one process everything is the identity."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def agree(t: Tensor) -> Tensor:
    """One value for all processes: floating-point tensors are averaged, others are those of the first process."""
    if not (dist.is_available() and dist.is_initialized()):
        return t
    t = t.clone()
    if t.is_floating_point():
        dist.all_reduce(t)
        return t / dist.get_world_size()
    dist.broadcast(t, 0)
    return t


def total(t: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_available() and dist.is_initialized():
        t = t.clone()
        dist.all_reduce(t)
    return t
