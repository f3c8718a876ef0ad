"""Compute a linear layer with the changes of its deltas, in forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .part import Cache, Delta, WeightGrad
from .roles import is_transposed
from .zeros import count_pruned


@contextmanager
def changed(
    weight: Tensor, deltas: Sequence[Delta], gates: Sequence[float], caches: Sequence[Cache] | None = None
) -> Iterator[tuple[Tensor, list[Cache]]]:
    """Yield the weight with the changes of ``deltas`` added, and what the deltas cache.

    The weight is a copy in float32 or wider. If every delta can restore what it overwrites, it is the weight
    itself and no copy is made. Then ``.data`` is changed, because autograd's version counter must not count
    a change that is undone before the weight is used again.
    """
    in_place = all(delta.restores for delta in deltas)
    if in_place:
        w = weight.data
    else:
        wide = torch.promote_types(weight.dtype, torch.float32)
        w = weight.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
    if caches is None:
        caches = [()] * len(deltas)
    try:
        found = []
        for delta, gate, cache in zip(deltas, gates, caches, strict=True):
            found.append(delta.add_(w, weight, gate, cache))
        if not in_place:
            _set_to_zero(w, deltas)
        yield w, found
    finally:
        if in_place:
            for delta in reversed(deltas):
                delta.restore_(w)


def _set_to_zero(weight: Tensor, deltas: Sequence[Delta]) -> None:
    """Set to 0 those entries of a weight, or of a change of it, that the layer of the deltas holds at 0.

    Deltas that write into the weight itself write only to the other entries.
    """
    pruned = deltas[0].pruned if deltas else None
    if pruned is not None:
        weight.masked_fill_(pruned, 0)


class _ChangedLinear(torch.autograd.Function):
    """``F.linear(x, weight + changes, bias)``.

    For backward it keeps what the deltas need of the input, and never a matrix of the weight's size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        deltas: list[Delta],
        gates: list[float],
        *trained: Tensor,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        with changed(weight, deltas, gates) as (w, caches), torch.autocast(device, enabled=False):
            y = F.linear(x, w.to(dtype), None if bias is None else bias.to(dtype))
        if any(ctx.needs_input_grad[5:]):
            saved: dict[int, Tensor] = {}  # deltas that need the same tensor share it
            ctx.saved_by = []
            for delta in deltas:
                needed = delta.save_input(x)
                saved[id(needed)] = needed
                ctx.saved_by.append(list(saved).index(id(needed)))
            ctx.save_for_backward(*saved.values())
        ctx.weight, ctx.deltas, ctx.gates, ctx.caches = weight, deltas, gates, caches
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with changed(ctx.weight, ctx.deltas, ctx.gates, ctx.caches) as (w, _):
                grad_x = grad_y @ w.to(grad_y.dtype)
        flat_y = grad_y.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = flat_y.sum(0)
        pulled: list[Tensor | None] = [None] * len(ctx.needs_input_grad[5:])
        if any(ctx.needs_input_grad[5:]):
            pulled = []
            # The saved tensors are read once: non-reentrant checkpointing refuses a second access.
            pruned = ctx.deltas[0].pruned
            grads = []
            for x in ctx.saved_tensors:
                grads.append(WeightGrad(flat_y, x.flatten(0, -2), len(grad_y), pruned))
            for delta, gate, cache, i in zip(ctx.deltas, ctx.gates, ctx.caches, ctx.saved_by, strict=True):
                pulled += delta.pull(grads[i], ctx.weight, gate, cache)
        return grad_x, None, grad_bias, None, None, *pulled


def changed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: list[Delta],
    gates: list[float] | None = None,
) -> Tensor:
    """Compute ``F.linear(x, weight + sum of gate * delta, bias)``.

    It needs the memory of a frozen layer and of the layer's input. ``gates``: by default the current gates of
    the deltas. Backward uses the same values.
    """
    if gates is None:
        gates = [delta.gate for delta in deltas]
    trained = [t for delta in deltas for t in delta.inputs()]
    run: Callable[..., Tensor] = _ChangedLinear.apply
    return run(x, weight, bias, deltas, gates, *trained)


class Patched(nn.Module):
    """A frozen linear layer and its deltas. ``weight`` is [out, in], also for the Conv1D of GPT-2."""

    base: Any  # a linear layer, or GPT-2's Conv1D

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.transposed = is_transposed(base)
        self.deltas: list[Delta] = []  # a plain list: the parts are owned by the method's state

    @property
    def original(self) -> Tensor:
        """Return the pretrained weight, [out, in]."""
        weight: Tensor = self.base.weight
        return weight.T if self.transposed else weight

    @property
    def live(self) -> int:
        """Return the number of entries of the weight that are not held at 0."""
        return self.original.numel() - count_pruned(self.base)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """Return the weight that the layer computes with, as a new matrix [out, in] of the base's dtype.

        Merging writes exactly this matrix.
        """
        wide = torch.promote_types(self.original.dtype, torch.float32)
        total = self.original.to(wide, copy=True, memory_format=torch.contiguous_format)
        for delta in self.deltas:
            if delta.gate:
                delta.add_(total, self.original, delta.gate)
        _set_to_zero(total, self.deltas)
        return total.to(self.original.dtype)

    @torch.no_grad()
    def sum_changes(self) -> tuple[Tensor, Tensor]:
        """Return the changed weight, and the sum of all changes, as exact as float64 is; [out, in]."""
        change = torch.zeros(self.original.shape, dtype=torch.float64, device=self.original.device)
        for delta in self.deltas:
            change += delta.gate * delta(self.original).double()
        _set_to_zero(change, self.deltas)
        return self.original.double() + change, change

    def count_changed(self) -> int:
        """Count the entries of the weight that merging would change, in the dtype of the weight."""
        exact, _ = self.sum_changes()
        return int((exact.to(self.original.dtype) != self.original).sum())

    def forward(self, x: Tensor) -> Tensor:
        active = [d for d in self.deltas if d.gate and d.has_effect]
        formed = [d for d in active if not d.additive]
        y: Tensor = changed_linear(x, self.original, self.bias, formed) if formed else self.base(x)
        for delta in active:
            if delta.additive:
                change = delta.linear(x, self.original)
                y = y + (change if delta.gate == 1 else delta.gate * change)
        return y
