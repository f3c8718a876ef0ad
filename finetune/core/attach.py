"""Attach parts to a model, switch them off, merge them into the weights, remove them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ConfigError
from .layer import Patched
from .part import Delta, Edit, Part
from .zeros import settle_zeros


def parts(states: nn.Module) -> list[Part]:
    """Return every part inside ``states``, in the order in which they were attached."""
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


# Where torch keeps the hooks of a module's forward pass. The handle of a hook refers to these dictionaries.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def attach(model: nn.Module, name: str, delta: Delta) -> None:
    """Stack ``delta`` on the linear layer called ``name``.

    Edits that act on the layer or read it stay active, and see the layer with its changed weight. Raises
    ``ConfigError`` if other code has registered hooks on it: a patched layer would not always run them.
    """
    owner, leaf = _owner(model, name)
    module = getattr(owner, leaf)
    if not isinstance(module, Patched):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        edits = [hook.__self__ for hook in hooks if _is_edit(hook)]
        if len(edits) < len(hooks) or module._backward_hooks or module._backward_pre_hooks:
            raise ConfigError(
                f"The layer {name} has hooks, which would not run while its weight is changed. Remove them, "
                "register them on the block around it, or leave the layer out of method.targets."
            )
        layer = Patched(module)
        for place in HOOKS:
            own, empty = getattr(module, place), getattr(layer, place)
            setattr(layer, place, own)
            setattr(module, place, empty)
        for edit in edits:
            edit.follow(module, layer)
        setattr(owner, leaf, layer)
        module = layer
    module.deltas.append(delta)
    delta.on_layer(name, module.base)


def patched(model: nn.Module) -> dict[str, Patched]:
    """Return the patched layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Patched)}


def has_parts(model: nn.Module) -> bool:
    """Tell whether a change or an edit is attached to a layer of the model."""
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if isinstance(module, Patched) or any(_is_edit(hook) for hook in hooks):
            return True
    return False


def _is_edit(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), Edit)


def detach(model: nn.Module, states: nn.Module) -> None:
    """Remove every part of ``states``, so that the model is as it was before ``build``."""
    for part in reversed(parts(states)):
        part.detach()
    unpatch(model)


def unpatch(model: nn.Module) -> None:
    """Put every original layer back."""
    for name, module in patched(model).items():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, module.base)


class NotMergeable(ConfigError):
    """Some part cannot be merged into weights."""


def check_mergeable(states: nn.Module) -> None:
    """Raise ``NotMergeable`` if some part of ``states`` cannot be merged into weights."""
    unmergeable = sorted({part.describe() for part in parts(states) if not part.mergeable})
    if unmergeable:
        raise NotMergeable(
            f"The model cannot be merged: the method attaches {' and '.join(unmergeable)}, "
            "which no weight can hold."
        )


@torch.no_grad()
def merge(model: nn.Module, states: nn.Module) -> None:
    """Write every part of ``states`` into the model's weights and put the plain layers back.

    This cannot be undone. Raises ``NotMergeable``, with nothing changed, if some part cannot be merged.
    """
    check_mergeable(states)
    for part in parts(states):
        part.fold()
    for module in patched(model).values():
        weight = module.weight
        module.base.weight.copy_(weight.T if module.transposed else weight)
    unpatch(model)
    settle_zeros(model)


@contextmanager
def base(states: nn.Module) -> Iterator[None]:
    """Set all gates to 0 inside the block, so that the model is the pretrained one, to the bit.

    Parts are switched off in the reverse order of attachment, and on again in the order of attachment. A part
    that trains a parameter in place restores the tensor that it replaced, which may be an earlier part's.
    """
    attached = parts(states)
    gates = [part.gate for part in attached]
    for part in reversed(attached):
        part.gate = 0.0
    try:
        yield
    finally:
        for part, gate in zip(attached, gates, strict=True):
            part.gate = gate
