"""Collectives between the processes of a run. With one process each returns its argument.

Every collective first reduces an abort flag. If one process runs out of memory at any point, the others raise
``Aborted`` at their next collective instead of waiting forever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 23  # entries that are reduced at once


class Aborted(Exception):
    """Another process has called ``abort``."""


def is_single_process() -> bool:
    """Tell whether there is no other process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _device() -> torch.device:
    """Return the device of exchanged tensors. NCCL does not accept CPU tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _reduce_flag(flag: bool) -> bool:
    """Tell whether the flag is set on any process."""
    reduced = torch.tensor(int(flag), device=_device())
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    return bool(reduced)


def barrier() -> None:
    """Wait for all processes. Raises ``Aborted``, as every collective does, if one of them has aborted."""
    if not is_single_process() and _reduce_flag(False):
        raise Aborted


def abort() -> None:
    """Make every other process raise ``Aborted`` at its next collective."""
    if not is_single_process():
        _reduce_flag(True)


def any_process(flag: bool) -> bool:
    """Tell whether the flag is set on any process."""
    if is_single_process():
        return flag
    barrier()
    return _reduce_flag(flag)


def average_or_broadcast(t: Tensor) -> Tensor:
    """Return the mean over all processes of a floating-point tensor, or the first process's other tensor."""
    if is_single_process():
        return t
    if t.is_floating_point():
        return sum_processes(t) / dist.get_world_size()
    barrier()
    sent = t.to(_device(), copy=True)
    dist.broadcast(sent, 0)
    return sent.to(t.device)


def sum_processes(t: Tensor) -> Tensor:
    """Return the sum of the tensor over all processes."""
    if is_single_process():
        return t
    barrier()
    sent = t.to(_device(), copy=True)
    dist.all_reduce(sent)
    return sent.to(t.device)


@torch.no_grad()
def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over all processes. One that is None on all of them stays None."""
    if is_single_process():
        return
    candidates = list(parameters)
    counts = sum_processes(torch.tensor([p.grad is not None for p in candidates], dtype=torch.int32)).tolist()
    present = [p for p, count in zip(candidates, counts, strict=True) if count]
    for bucket in _buckets(present):
        pieces = []
        for p in bucket:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            pieces.append(grad.reshape(-1))
        total = sum_processes(torch.cat(pieces))
        for p, piece in zip(bucket, total.split([p.numel() for p in bucket]), strict=True):
            p.grad = piece.view(p.shape).clone()


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors of one dtype and device: at most ``BUCKET`` entries, or one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for p in parameters:
        same_kind = not bucket or (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (size + p.numel() > BUCKET or not same_kind):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of the first process."""
    if is_single_process():
        return
    for t in tensors:
        barrier()
        sent = t.to(_device(), copy=True)
        dist.broadcast(sent, 0)
        t.copy_(sent)


def gather(item: Any) -> list[Any]:
    """Return the item of each process, in the order of their ranks."""
    if is_single_process():
        return [item]
    barrier()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found
