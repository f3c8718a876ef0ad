"""Train existing parameters of the model under their own names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .changes import Changes, Unit
from .part import Part, Source
from .zeros import count_pruned, stored_mask


def list_untrained(model: nn.Module) -> list[str]:
    """List the names of the parameters that nothing trains yet."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def _cast_while_running(owner: nn.Module, leaf: str, dtype: torch.dtype) -> list[RemovableHandle]:
    """Cast a float32 parameter to ``dtype``, that of its module's other tensors, while the module runs.

    The cast is differentiable, so the gradient reaches the float32 parameter.
    """
    replaced: list[nn.Parameter] = []

    # The hooks act on the module that runs. In a deep copy of the model, this module is not ``owner``.
    def cast_parameter(module: nn.Module, *_: Any) -> None:
        parameter = module._parameters[leaf]
        if parameter is not None and parameter.dtype != dtype:
            replaced.append(parameter)
            module._parameters[leaf] = cast(nn.Parameter, parameter.to(dtype))

    def restore_parameter(module: nn.Module, *_: Any) -> None:
        if replaced:
            module._parameters[leaf] = replaced.pop()

    before = owner.register_forward_pre_hook(cast_parameter)
    after = owner.register_forward_hook(restore_parameter, always_call=True)
    return [before, after]


def _mask_gradient(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Return the gradient of a layer's weight with 0 at the entries that are held at 0."""
    pruned = stored_mask(layer)
    return gradient if pruned is None else gradient.masked_fill(pruned, 0)


def train_class_token(model: nn.Module, decays: bool) -> InPlace | None:
    """Train the class token in place; return None for a model without one.

    ``decays``: whether weight decay acts on it.
    """
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "cls_token"]
    return InPlace(model, names, keep=True, decays=decays) if names else None


class InPlace(Part):
    """Parameters of the model, trained in float32 or wider under the model's names. The gate is 0 or 1.

    With ``keep`` the originals stay in memory, which is meant for few parameters. Without it the model's own
    tensors are trained, no copy is made, and ``source`` reads the originals again when the base is needed.

    The gradient of an entry that is held at 0 is 0. So neither an optimizer's step nor weight decay moves it.
    """

    gate_is_switch = True
    keeps_zeros = True
    source: Source | None = None

    def __init__(self, model: nn.Module, names: list[str], keep: bool, decays: bool = True) -> None:
        super().__init__()
        self.names, self.keep, self.decays, self._gate = names, keep, decays, 1.0
        self.is_frozen = False
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
        self._hooks: list[RemovableHandle] = []
        parameters = dict(model.named_parameters())
        name_of = {id(parameters[name]): name for name in names}
        for used_as, parameter in model.named_parameters(
            remove_duplicate=False
        ):  # tied ones have several names
            if id(parameter) in name_of:
                owner, _, leaf = used_as.rpartition(".")
                self._owners[name_of[id(parameter)]].append((model.get_submodule(owner), leaf))
        for name in names:
            old = parameters[name]
            wide = torch.promote_types(old.dtype, torch.float32)
            self.register_parameter(self._key(name), nn.Parameter(old.detach().to(wide, copy=keep)))
            if keep:
                self.register_buffer(self._key(name) + ":original", old.detach(), persistent=False)
            if old.dtype != wide:
                for module, leaf in self._owners[name]:
                    self._hooks += _cast_while_running(module, leaf, old.dtype)
        self._install(self.trained())
        self._mask_gradients()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Mask gradients in a copy, too: torch copies a parameter without its hooks."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        for name, parameter in self.trained().items():
            layer = self.find_layer(name)
            if layer is not None:
                trains = parameter.requires_grad
                parameter.requires_grad_(True).register_hook(partial(_mask_gradient, layer))
                parameter.requires_grad_(trains)

    def find_layer(self, name: str) -> nn.Module | None:
        """Return the layer whose weight this trained parameter is, if entries of the weight are held at 0."""
        for owner, leaf in self._owners[name]:
            if leaf == "weight" and stored_mask(owner) is not None:
                return owner
        return None

    @staticmethod
    def _key(name: str) -> str:
        """Return the name as torch allows it for a parameter."""
        return name.replace(".", "/")

    def _install(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put these parameters into the model."""
        for name, parameter in parameters.items():
            for owner, leaf in self._owners[name]:
                owner._parameters[leaf] = parameter

    def _originals(self) -> dict[str, nn.Parameter]:
        """Return the original parameters, frozen, on the device of the trained ones."""
        found: dict[str, nn.Parameter] = {}
        for name, original in self._read_originals():
            found[name] = nn.Parameter(original, requires_grad=False)
        return found

    def _read_originals(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the original values by name, one tensor at a time, on the device of the trained ones."""
        if self.keep:
            for name in self.names:
                yield name, self.original(name)
            return
        if self.source is None:
            raise RuntimeError("the base was trained in place; without a model file it cannot be read again")
        device = next(self.parameters()).device
        for name, tensor in self.source():
            if name in self._owners:
                yield name, tensor.to(device)

    @property
    def gate(self) -> float:  # a property, because switching moves tensors
        return self._gate

    @gate.setter
    def gate(self, value: float) -> None:
        if value not in (0.0, 1.0):
            raise ValueError(f"the gate of parameters trained in place is 1 (on) or 0 (off), not {value}")
        if value != self._gate:
            self._install(self.trained() if value else self._originals())
            self._gate = value

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the model's names."""
        return {name: self.get_parameter(self._key(name)) for name in self.names}

    def freeze_for_good(self) -> None:
        """Stop training these parameters for good. They then count neither as trained nor as changeable."""
        self.is_frozen = True
        self.requires_grad_(False)

    def original(self, name: str) -> torch.Tensor:
        """Return the pretrained value of a parameter. Requires ``keep``."""
        return self.get_buffer(self._key(name) + ":original")

    def describe(self) -> str:
        return "parameters trained in place"

    def adapted(self) -> int:
        return 0 if self.is_frozen else sum(p.numel() for p in self.parameters()) - self.count_held()

    def count_held(self) -> int:
        if self.is_frozen:
            return 0
        layers = [self.find_layer(name) for name in self.names]
        return sum(count_pruned(layer) for layer in layers if layer is not None)

    @torch.no_grad()
    def count_changed(self) -> int:
        if self.is_frozen:
            return 0
        trained, count = self.trained(), 0
        for name, original in self._read_originals():
            count += int((trained[name].to(original.dtype) != original).sum())
        return count

    @property
    def recoverable(self) -> bool:
        return self.keep

    def changes(self) -> Changes:
        return Changes() if self.is_frozen else Changes(parameters=self.trained())

    def units(self) -> list[Unit]:
        return [Unit(name, name, p) for name, p in self.trained().items() if p.requires_grad]

    def use_source(self, source: Source | None) -> None:
        self.source = source

    def detach(self) -> None:
        """Put the originals back into the model. The trained values stay in this part."""
        self.gate = 0.0
        for hook in self._hooks:
            hook.remove()
