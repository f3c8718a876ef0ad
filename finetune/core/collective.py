"""Agreement between processes; with one process everything is the identity.

Every exchange begins with one number: whether somebody breaks off. So a process that ran out of memory, wherever that was, meets the others in
whatever exchange they come to next, and all of them leave it by ``BrokenOff``; none waits for one that does something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 23  # entries that are exchanged at once


class BrokenOff(Exception):
    """Some process has called ``break_off``."""


def alone() -> bool:
    """Whether there is no other process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _place() -> torch.device:
    """Where tensors are exchanged: NCCL takes none of the CPU's."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _any(said: bool) -> bool:
    told = torch.tensor(int(said), device=_place())
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def meet() -> None:
    """Wait for all processes. Raises ``BrokenOff``, as every exchange does."""
    if not alone() and _any(False):
        raise BrokenOff


def break_off() -> None:
    """Break off what all processes do: each gets ``BrokenOff`` but this one."""
    if not alone():
        _any(True)


def anyone(said: bool) -> bool:
    """Whether it is so on any process."""
    if alone():
        return said
    meet()
    return _any(said)


def agree(t: Tensor) -> Tensor:
    """One value for all processes: floating-point tensors are averaged, others are those of the first process."""
    if alone():
        return t
    if t.is_floating_point():
        return total(t) / dist.get_world_size()
    meet()
    sent = t.to(_place(), copy=True)
    dist.broadcast(sent, 0)
    return sent.to(t.device)


def total(t: Tensor) -> Tensor:
    """The sum over all processes."""
    if alone():
        return t
    meet()
    sent = t.to(_place(), copy=True)
    dist.all_reduce(sent)
    return sent.to(t.device)


@torch.no_grad()
def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Make every gradient the sum of all processes'. One that no process has stays None."""
    if alone():
        return
    every = list(parameters)
    there = total(torch.tensor([p.grad is not None for p in every], dtype=torch.int32)).tolist()
    for bucket in _buckets([p for p, has in zip(every, there, strict=True) if has]):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        for p, part in zip(bucket, total(flat).split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view(p.shape).clone()


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive ones of one type and device, at most ``BUCKET`` entries together unless one has more."""
    bucket: list[Tensor] = []
    for p in parameters:
        if bucket and (
            sum(q.numel() for q in bucket) + p.numel() > BUCKET
            or (p.dtype, p.device) != (bucket[0].dtype, bucket[0].device)
        ):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


@torch.no_grad()
def share_(tensors: Iterable[Tensor]) -> None:
    """Overwrite with those of the first process."""
    for t in tensors if not alone() else ():
        meet()
        sent = t.to(_place(), copy=True)
        dist.broadcast(sent, 0)
        t.copy_(sent)


def gather(item: Any) -> list[Any]:
    """What each process gave, in the order of their numbers."""
    if alone():
        return [item]
    meet()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found
