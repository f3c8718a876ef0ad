"""What a method attaches to a frozen model: parts, and the gradients that they read.

A *part* is what a method attaches. A ``Delta`` changes the weight of one linear layer, an ``Edit``
(``edit.py``) changes what one module receives or gives, and ``InPlace`` (``inplace.py``) trains parameters of
the model itself. Parts belong to the state that a method builds. The model only refers to them, so its own
parameters stay the pretrained ones. ``layer.py`` computes with deltas, and ``attach.py`` attaches, merges and
removes parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from .changes import Unit
from .edit import Edit as Edit
from .part_base import Part as Part
from .part_base import Source as Source
from .zeros import find_pruned

Cache = tuple[Tensor, ...]


class WeightGrad:
    """The gradient of one layer's weight, computed only on request.

    ``grad_y``: [n, out]. ``x``: what the delta saved of the input, [n, in] or fewer columns. ``examples``:
    number of examples in the n rows; each has the same number of rows. ``pruned`` [out, in] bool: entries
    that are held at 0, whose gradient is 0; None: no entry is.
    """

    def __init__(self, grad_y: Tensor, x: Tensor, examples: int = 1, pruned: Tensor | None = None) -> None:
        self.grad_y, self.x, self.examples, self.pruned = grad_y, x, examples, pruned

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

    def _product(self, grad_y: Tensor, x: Tensor) -> Tensor:
        grad = grad_y.T @ x
        if self.pruned is not None:
            grad.masked_fill_(self.pruned, 0)
        return grad.to(torch.promote_types(grad.dtype, torch.float32))


class Delta(Part):
    """A trained change of one weight [out, in]. A subclass writes ``forward``; other methods make it cheaper.

    ``gate`` is read once, when a forward pass begins. ``add_`` and ``pull`` receive that value, so that the
    backward pass computes with the gate of its forward pass.
    """

    layer: str | None = None  # dotted name of the layer that ``attach`` put it on
    restores: bool = False  # whether ``restore_`` undoes ``add_`` to the bit, so that no copy is needed
    _layers: Sequence[nn.Module] = ()  # that layer; in a list, since a module would join the state

    def on_layer(self, name: str, layer: nn.Module) -> None:
        """Remember the layer that the delta changes."""
        self.layer, self._layers = name, [layer]

    @property
    def pruned(self) -> Tensor | None:
        """Return which entries of the layer's weight are held at 0, [out, in] bool; None if none are.

        The layer sets the change to 0 there, whatever ``forward`` and ``add_`` say.
        """
        return find_pruned(self._layers[0]) if self._layers else None

    @property
    def keeps_zeros(self) -> bool:
        """Tell whether no entry that is held at 0 ever differs from 0.

        The layer masks every change that it forms by ``forward``. A delta with a ``linear`` of its own
        overrides this: it returns True if ``linear`` leaves out pruned entries by ``pruned``, or if the
        layer may form the change by ``forward`` instead.
        """
        return type(self).linear is Delta.linear

    def forward(self, weight: Tensor) -> Tensor:
        """Return the change, [out, in], without the gate."""
        raise NotImplementedError

    @property
    def additive(self) -> bool:
        """Tell whether the layer adds ``linear`` to its output instead of using the changed weight.

        On a layer with entries that are held at 0, the change has to be formed.
        """
        return type(self).linear is not Delta.linear and self.pruned is None

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
        inputs = self.inputs()
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        found: dict[int, Tensor | None] = {}
        if trained:
            with torch.enable_grad():
                change = gate * self(original)
            dense = grad.dense.to(change.dtype)
            grads = torch.autograd.grad(change, trained, dense, allow_unused=True)
            found = {id(tensor): pulled for tensor, pulled in zip(trained, grads, strict=True)}
        return tuple(found.get(id(tensor)) for tensor in inputs)
