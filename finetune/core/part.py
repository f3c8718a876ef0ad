"""Attach changes to a frozen model, switch them off, fold them in, take them away.

A *part* is what a method attaches: a ``Delta`` changes the weight of one linear layer, an ``Edit`` the output of one module. Parts belong to the
state that a method builds; the model only refers to them, so its own parameters stay exactly the pretrained ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kept = tuple[Tensor, ...]


class Part(nn.Module):
    """Anything that a method attaches. ``gate`` scales its effect; at 0 it is absent, and the model is the base to the bit."""

    gate: float = 1.0
    decays: bool = True  # whether weight decay may pull its matrices towards zero

    def adapted(self) -> int:
        """Entries of the model that this part can change; deltas are counted by the layer they sit on."""
        return 0

    def detach(self) -> None:
        """Leave the model as it was before this part. Deltas need nothing: ``unpatch`` removes the layer they sit on."""

    def fold(self) -> None:
        """Make the change permanent where ``merge`` cannot: for parts that are no deltas."""


class Edit(Part):
    """A trained change of one module's output."""

    def forward(self, y: Tensor) -> Tensor:
        """The change, of the shape of ``y``."""
        raise NotImplementedError

    def on(self, module: nn.Module) -> Edit:
        """Add ``gate * self(y)`` to every output of ``module``; ``detach`` ends it."""
        self._hook = module.register_forward_hook(
            lambda _module, _args, y: y + self.gate * self(y) if self.gate else y
        )
        return self

    def detach(self) -> None:
        self._hook.remove()


class WeightGrad:
    """The gradient of one layer's weight, computed only when asked for: ``grad_y`` is [n, out], ``x`` what the delta kept of [n, in].

    ``examples``: how many examples the n rows are, each as many rows as the others.
    """

    def __init__(self, grad_y: Tensor, x: Tensor, examples: int = 1) -> None:
        self.grad_y, self.x, self.examples = grad_y, x, examples

    @cached_property
    def dense(self) -> Tensor:
        """[out, in], float32 or wider; of all of x."""
        return self._product(self.grad_y, self.x)

    @property
    def squares(self) -> Tensor:
        """[out, in]: the sum over examples of the square of each one's gradient."""
        pairs = zip(self.grad_y.chunk(self.examples), self.x.chunk(self.examples), strict=True)
        first, *rest = (self._product(y, x).square_() for y, x in pairs)
        return sum(rest, first)

    @staticmethod
    def _product(grad_y: Tensor, x: Tensor) -> Tensor:
        grad = grad_y.T @ x
        return grad.to(torch.promote_types(grad.dtype, torch.float32))


class Delta(Part):
    """A trained change of one weight [out, in]. A subclass writes ``forward``; the rest are cheaper equals of it."""

    def forward(self, weight: Tensor) -> Tensor:
        """The change, [out, in], without the gate."""
        raise NotImplementedError

    @property
    def additive(self) -> bool:
        """Whether the layer adds ``linear`` to its output, instead of running once with the changed weight."""
        return type(self).linear is not Delta.linear

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """The change as seen from the input, [..., out]; overridden where that is cheaper than forming the matrix."""
        raise NotImplementedError

    @property
    def acts(self) -> bool:
        """Whether this delta has anything to do now; if not, the layer runs as if it were not there."""
        return True

    def inputs(self) -> tuple[Tensor, ...]:
        """The trained tensors, in the order in which ``pull`` returns their gradients."""
        return tuple(self.parameters())

    def keep(self, x: Tensor) -> Tensor:
        """What ``pull`` needs of the input [..., in]: itself, or less."""
        return x

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, kept: Kept = ()) -> Kept:
        """Add the gated change to ``weight`` in place. Returns the small tensors which make the next call, given them, do exactly the same."""
        weight.add_(self(original), alpha=self.gate)
        return ()

    def pull(self, grad: WeightGrad, original: Tensor, kept: Kept) -> tuple[Tensor | None, ...]:
        """The gradients of ``inputs()``, by forming the change again."""
        with torch.enable_grad():
            change = self.gate * self(original)
        return torch.autograd.grad(change, self.inputs(), grad.dense.to(change.dtype), allow_unused=True)


class Restorable(Delta):
    """A delta which can undo its ``add_`` to the bit, so that it may work inside the base weight itself."""

    def restore_(self, weight: Tensor) -> None:
        """Put the original entries back."""
        raise NotImplementedError


@contextmanager
def changed(
    weight: Tensor, deltas: Sequence[Delta], kept: Sequence[Kept] | None = None
) -> Iterator[tuple[Tensor, list[Kept]]]:
    """The weight with the changes of ``deltas`` in it, float32 or wider unless lent, and what the deltas kept, for as long as the block lasts.

    Deltas that can restore what they overwrite are lent the weight itself and no copy is made; ``.data`` because autograd's version counter must not
    see a change that is undone before anyone can use the weight again.
    """
    lent = all(isinstance(d, Restorable) for d in deltas)
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = weight.data if lent else weight.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
    try:
        yield w, [d.add_(w, weight, k) for d, k in zip(deltas, kept or [()] * len(deltas), strict=True)]
    finally:
        for delta in reversed(deltas) if lent else ():
            assert isinstance(delta, Restorable)
            delta.restore_(weight.data)


class _ChangedLinear(torch.autograd.Function):
    """``F.linear(x, weight + changes, bias)``; keeps what the deltas need of the input for backward, never a matrix of the weight's size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deltas: list[Delta], *trained: Tensor
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        with changed(weight, deltas) as (w, kept), torch.autocast(device, enabled=False):
            y = F.linear(x, w.to(dtype), None if bias is None else bias.to(dtype))
        if any(ctx.needs_input_grad[4:]):
            ctx.save_for_backward(*(d.keep(x) for d in deltas))
        ctx.weight, ctx.deltas, ctx.kept = weight, deltas, kept
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with changed(ctx.weight, ctx.deltas, ctx.kept) as (w, _):
                grad_x = grad_y @ w.to(grad_y.dtype)
        flat_y = grad_y.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = flat_y.sum(0)
        grads: dict[int, WeightGrad] = {}
        pulled: list[Tensor | None] = []
        for delta, kept, x in zip(ctx.deltas, ctx.kept, ctx.saved_tensors, strict=bool(ctx.saved_tensors)):
            grad = grads.setdefault(
                id(x), WeightGrad(flat_y, x.flatten(0, -2), len(grad_y))
            )  # one product serves all that kept the same
            pulled += delta.pull(grad, ctx.weight, kept)
        return grad_x, None, grad_bias, None, *(pulled or [None] * len(ctx.needs_input_grad[4:]))


def changed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: list[Delta]) -> Tensor:
    """``F.linear(x, weight + sum of gate * delta, bias)`` with the memory of a frozen layer plus its input."""
    return _ChangedLinear.apply(x, weight, bias, deltas, *(t for d in deltas for t in d.inputs()))  # type: ignore[no-any-return, no-untyped-call]


class Patched(nn.Module):
    """A frozen linear layer and the deltas stacked on it. ``weight`` is always [out, in], GPT-2's transposed layers included."""

    base: Any  # a linear layer, or GPT-2's Conv1D

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.transposed = type(base).__name__ == "Conv1D"
        self.deltas: list[Delta] = []  # a plain list: the parts are owned by the method's state

    @property
    def original(self) -> Tensor:
        """The pretrained weight, [out, in]."""
        weight: Tensor = self.base.weight
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """What the layer computes with, as one new matrix [out, in] of the base's dtype: the one definition of merging."""
        wide = torch.promote_types(self.original.dtype, torch.float32)
        total = self.original.to(wide, copy=True, memory_format=torch.contiguous_format)
        for delta in self.deltas:
            if delta.gate:
                delta.add_(total, self.original)
        return total.to(self.original.dtype)

    def forward(self, x: Tensor) -> Tensor:
        active = [d for d in self.deltas if d.gate and d.acts]
        formed = [d for d in active if not d.additive]
        y: Tensor = changed_linear(x, self.original, self.bias, formed) if formed else self.base(x)
        for delta in active:
            if delta.additive:
                change = delta.linear(x, self.original)
                y = y + (change if delta.gate == 1 else delta.gate * change)
        return y


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def attach(model: nn.Module, name: str, delta: Delta) -> None:
    """Stack ``delta`` on the linear layer called ``name``."""
    owner, leaf = _owner(model, name)
    module = getattr(owner, leaf)
    if not isinstance(module, Patched):
        module = Patched(module)
        setattr(owner, leaf, module)
    module.deltas.append(delta)


def patched(model: nn.Module) -> dict[str, Patched]:
    """The patched layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Patched)}


def detach(model: nn.Module, states: nn.Module) -> None:
    """Take every part of ``states`` away: the model is as it was before ``build``."""
    for part in states.modules():
        if isinstance(part, Part):
            part.detach()
    unpatch(model)


def unpatch(model: nn.Module) -> None:
    """Put every original layer back."""
    for name, module in patched(model).items():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, module.base)


@torch.no_grad()
def merge(model: nn.Module, states: nn.Module) -> None:
    """Fold every part of ``states`` into the model, for good, and put the plain layers back."""
    for part in states.modules():
        if isinstance(part, Part):
            part.fold()
    for module in patched(model).values():
        weight = module.weight
        module.base.weight.copy_(weight.T if module.transposed else weight)
    unpatch(model)


@contextmanager
def base(states: nn.Module) -> Iterator[None]:
    """Inside, the model is the pretrained one, to the bit: every part of ``states`` has gate 0."""
    parts = [m for m in states.modules() if isinstance(m, Part)]
    gates = [p.gate for p in parts]
    for part in parts:
        part.gate = 0.0
    try:
        yield
    finally:
        for part, gate in zip(parts, gates, strict=True):
            part.gate = gate
