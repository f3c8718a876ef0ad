"""Attach trained changes to a frozen model, switch them off, merge them into the weights, remove them.

A *part* is what a method attaches. A ``Delta`` changes the weight of one linear layer, an ``Edit`` changes
the output of one module, and ``InPlace`` (``inplace.py``) trains parameters of the model itself. Parts belong
to the state that a method builds. The model only refers to them, so its own parameters stay the pretrained
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from .changes import Changes, Unit
from .roles import is_transposed
from .state import StateModule

Cache = tuple[Tensor, ...]
Source = Callable[[], Iterator[tuple[str, Tensor]]]  # reads the model's original parameters again, by name


class Part(StateModule):
    """Anything that a method attaches to the model.

    ``gate`` scales its effect. At 0 the part is absent and the model computes what the pretrained one
    computes, to the bit. The attributes and methods below declare what other code needs to know of a part.
    """

    gate: float = 1.0
    gate_is_switch: bool = False  # whether the gate can only be 0 or 1
    decays: bool = True  # whether weight decay may pull its matrices towards zero
    mergeable: bool = True  # whether ``merge`` can make its change permanent
    folds_itself: bool = False  # whether ``fold`` writes into the model's weights, in their dtype

    def describe(self) -> str:
        """Return a noun phrase for messages."""
        return f"a change of type {type(self).__name__}"

    def adapted(self) -> int:
        """Count the model's entries that this part can change. Deltas return 0: their layers are counted."""
        return 0

    @property
    def recoverable(self) -> bool:
        """Tell whether gate 0 gives the pretrained model back without reading a file."""
        return True

    def changes(self) -> Changes:
        """Return the trained change in the simplest form that it has, without the gate."""
        return Changes()

    def export_as(self, format_name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """Return configuration and tensors in an external format, if the part writes it itself."""
        return None

    def units(self) -> list[Unit]:
        """Return the groups of values that are trained now, each with its place in the model."""
        return [Unit(name, None, p) for name, p in self.named_parameters() if p.requires_grad]

    def use_source(self, source: Source | None) -> None:
        """Receive the function that reads the original parameters again. Most parts have no use for it."""

    def detach(self) -> None:
        """Leave the model as it was before this part. Deltas do nothing: ``unpatch`` removes their layers."""

    def fold(self) -> None:
        """Make the change permanent. Deltas do nothing: ``merge`` writes their layers' weights."""


class Edit(Part):
    """A trained change of one module's output. By default it cannot be merged: no weight holds it."""

    mergeable = False

    def describe(self) -> str:
        return f"an edit of a module's output ({type(self).__name__})"

    def forward(self, y: Tensor) -> Tensor:
        """Return the change, of the shape of the output ``y``."""
        raise NotImplementedError

    def on(self, module: nn.Module) -> Edit:
        """Add ``gate * self(y)`` to every output of ``module`` until ``detach`` is called."""
        self._hook = module.register_forward_hook(
            lambda _module, _args, y: y + self.gate * self(y) if self.gate else y
        )
        return self

    def detach(self) -> None:
        self._hook.remove()


class WeightGrad:
    """The gradient of one layer's weight, computed only on request.

    ``grad_y``: [n, out]. ``x``: what the delta saved of the input, [n, in] or fewer columns. ``examples``:
    number of examples in the n rows; each has the same number of rows.
    """

    def __init__(self, grad_y: Tensor, x: Tensor, examples: int = 1) -> None:
        self.grad_y, self.x, self.examples = grad_y, x, examples

    @cached_property
    def dense(self) -> Tensor:
        """Return the gradient, [out, in], float32 or wider. Requires that ``x`` has all columns."""
        return self._product(self.grad_y, self.x)

    @property
    def is_formed(self) -> bool:
        """Tell whether ``dense`` has been computed already."""
        return "dense" in self.__dict__

    @property
    def squares(self) -> Tensor:
        """Return the sum over examples of each example's squared gradient, [out, in]."""
        total: Tensor | None = None
        for y, x in zip(self.grad_y.chunk(self.examples), self.x.chunk(self.examples), strict=True):
            square = self._product(y, x).square_()
            total = square if total is None else total.add_(square)
        assert total is not None
        return total

    @staticmethod
    def _product(grad_y: Tensor, x: Tensor) -> Tensor:
        grad = grad_y.T @ x
        return grad.to(torch.promote_types(grad.dtype, torch.float32))


class Delta(Part):
    """A trained change of one weight [out, in]. A subclass writes ``forward``; other methods make it cheaper.

    ``gate`` is read once, when a forward pass begins. ``add_`` and ``pull`` receive that value, so that the
    backward pass computes with the gate of its forward pass.
    """

    layer: str | None = None  # dotted name of the layer that ``attach`` put it on
    restores: bool = False  # whether ``restore_`` undoes ``add_`` to the bit, so that no copy is needed

    def forward(self, weight: Tensor) -> Tensor:
        """Return the change, [out, in], without the gate."""
        raise NotImplementedError

    @property
    def additive(self) -> bool:
        """Tell whether the layer adds ``linear`` to its output instead of using the changed weight."""
        return type(self).linear is not Delta.linear

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return ``x`` times the change, [..., out], without the gate.

        Override it if that is cheaper than forming the matrix.
        """
        raise NotImplementedError

    @property
    def has_effect(self) -> bool:
        """Tell whether this delta has any effect now; if not, the layer skips it."""
        return True

    def inputs(self) -> tuple[Tensor, ...]:
        """Return the trained tensors, in the order in which ``pull`` returns their gradients."""
        return tuple(self.parameters())

    def units(self) -> list[Unit]:
        return [Unit(name, self.layer, p) for name, p in self.named_parameters() if p.requires_grad]

    def save_input(self, x: Tensor) -> Tensor:
        """Return what ``pull`` needs of the input [..., in]: all of it, or fewer columns."""
        return x

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, gate: float, cache: Cache = ()) -> Cache:
        """Add ``gate`` times the change to ``weight`` in place.

        Returns small tensors to cache; pass them back as ``cache`` to reproduce the same change in backward.
        """
        weight.add_(self(original), alpha=gate)
        return ()

    def restore_(self, weight: Tensor) -> None:
        """Put back the entries that the last ``add_`` overwrote, if they have not been put back yet."""

    def pull(
        self, grad: WeightGrad, original: Tensor, gate: float, cache: Cache
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``inputs()``; by default, form the change again and differentiate it."""
        with torch.enable_grad():
            change = gate * self(original)
        return torch.autograd.grad(change, self.inputs(), grad.dense.to(change.dtype), allow_unused=True)


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
        yield w, found
    finally:
        if in_place:
            for delta in reversed(deltas):
                delta.restore_(w)


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
            grads = [WeightGrad(flat_y, x.flatten(0, -2), len(grad_y)) for x in ctx.saved_tensors]
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
        return total.to(self.original.dtype)

    def forward(self, x: Tensor) -> Tensor:
        active = [d for d in self.deltas if d.gate and d.has_effect]
        formed = [d for d in active if not d.additive]
        y: Tensor = changed_linear(x, self.original, self.bias, formed) if formed else self.base(x)
        for delta in active:
            if delta.additive:
                change = delta.linear(x, self.original)
                y = y + (change if delta.gate == 1 else delta.gate * change)
        return y


def parts(states: nn.Module) -> list[Part]:
    """Return every part inside ``states``."""
    return [module for module in states.modules() if isinstance(module, Part)]


def trained_in_place(states: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the parts of ``states`` train in place, by the model's names."""
    found: dict[str, nn.Parameter] = {}
    for part in parts(states):
        found |= part.changes().parameters
    return found


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
    delta.layer = name


def patched(model: nn.Module) -> dict[str, Patched]:
    """Return the patched layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Patched)}


def detach(model: nn.Module, states: nn.Module) -> None:
    """Remove every part of ``states``, so that the model is as it was before ``build``."""
    for part in parts(states):
        part.detach()
    unpatch(model)


def unpatch(model: nn.Module) -> None:
    """Put every original layer back."""
    for name, module in patched(model).items():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, module.base)


def check_mergeable(states: nn.Module) -> None:
    """Raise ``ConfigError`` if some part of ``states`` cannot be merged into weights."""
    unmergeable = sorted({part.describe() for part in parts(states) if not part.mergeable})
    if unmergeable:
        raise ConfigError(
            f"The model cannot be merged: the method attaches {' and '.join(unmergeable)}, "
            "which no weight can hold."
        )


@torch.no_grad()
def merge(model: nn.Module, states: nn.Module) -> None:
    """Write every part of ``states`` into the model's weights and put the plain layers back.

    This cannot be undone. Raises ``ConfigError``, with nothing changed, if some part cannot be merged.
    """
    check_mergeable(states)
    for part in parts(states):
        part.fold()
    for module in patched(model).values():
        weight = module.weight
        module.base.weight.copy_(weight.T if module.transposed else weight)
    unpatch(model)


@contextmanager
def base(states: nn.Module) -> Iterator[None]:
    """Make the model the pretrained one, to the bit, inside the block: all gates are 0."""
    attached = parts(states)
    gates = [part.gate for part in attached]
    for part in attached:
        part.gate = 0.0
    try:
        yield
    finally:
        for part, gate in zip(attached, gates, strict=True):
            part.gate = gate
