"""What the modules of a method's or selector's state declare, so that no caller has to know their classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class EntryStore(Protocol):
    """Trained values that are single entries of weights, all in one parameter."""

    values: nn.Parameter  # [capacity]
    ages: bool  # whether the optimizer counts the steps of each value separately
    shapes: list[tuple[int, int]]  # [out, in] of each site
    watch: Callable[..., bool] | None  # called in backward with the gradient of each site

    def bounds(self) -> list[int]:
        """Return where the values of each site start; [sites + 1]."""

    def positions(self, i: int) -> Tensor:
        """Return the flat positions of site ``i``'s values in its weight, int32, ascending."""


class StateModule(nn.Module):
    """Base of the modules that make up a state: parts, stores of values, and bookkeeping of methods."""

    # Counts changes of this module that cannot be repeated. A step is retried after running out of memory
    # only if no revision has changed meanwhile.
    revision: int = 0

    @property
    def entry_store(self) -> EntryStore | None:
        """Return the store if this module's trained values are single entries of weights."""
        return None

    @property
    def is_packed(self) -> bool:
        """Tell whether the module is stored as ``pack`` returns it instead of as its ``state_dict``."""
        return type(self).pack is not StateModule.pack

    def pack(self) -> dict[str, Tensor]:
        """Return what a finished run stores of this module and everything inside it. Optional."""
        raise NotImplementedError

    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Load what ``pack`` returned. Raises ``ConfigError`` if it does not fit."""
        raise NotImplementedError

    def export_as(self, format_name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """Return configuration and tensors in an external format, if the module writes it itself.

        What it returns stands for everything that the method has trained.
        """
        return None

    def stored_shapes(self) -> Shapes | None:
        """Return dtype and shape of what ``pack`` will return after training; None if training decides."""
        return {name: (t.dtype, tuple(t.shape)) for name, t in self.pack().items()}


def state_modules(states: nn.Module) -> Iterator[StateModule]:
    """Yield every ``StateModule`` inside ``states``."""
    for module in states.modules():
        if isinstance(module, StateModule):
            yield module


def entry_stores(states: nn.Module) -> list[EntryStore]:
    """Return the stores of single entries inside ``states``."""
    found = [module.entry_store for module in state_modules(states)]
    return [store for store in found if store is not None]


def packed_modules(states: nn.Module) -> dict[str, StateModule]:
    """Return the packed modules by the prefix of their tensors' names (``"method.bank."``)."""
    found = {}
    for name, module in states.named_modules():
        if isinstance(module, StateModule) and module.is_packed:
            found[f"{name}." if name else ""] = module
    return found


def stored_shapes(state: nn.Module) -> Shapes | None:
    """Return dtype and shape of every tensor that a finished run stores of ``state``, by name.

    None if training decides how much some module stores.
    """
    packed = packed_modules(state)
    found: Shapes = {}
    for name, tensor in state.state_dict().items():
        if not name.startswith(tuple(packed)):
            found[name] = tensor.dtype, tuple(tensor.shape)
    for prefix, module in packed.items():
        shapes = module.stored_shapes()
        if shapes is None:
            return None
        for name, shape in shapes.items():
            found[prefix + name] = shape
    return found
