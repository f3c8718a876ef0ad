"""Train existing parameters where they are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .changes import Changes, Unit
from .part import Part, Source


def untrained(model: nn.Module) -> list[str]:
    """Names of the parameters that nothing trains yet."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def _cast_while_running(owner: nn.Module, leaf: str, dtype: torch.dtype) -> list[RemovableHandle]:
    """While ``owner`` runs it finds the parameter in ``dtype``, as its other tensors are; the gradient reaches the float32 one."""
    kept: list[nn.Parameter] = []

    def lend(*_: Any) -> None:
        parameter = owner._parameters[leaf]
        if parameter is not None and parameter.dtype != dtype:
            kept.append(parameter)
            owner._parameters[leaf] = cast(nn.Parameter, parameter.to(dtype))

    def restore(*_: Any) -> None:
        if kept:
            owner._parameters[leaf] = kept.pop()

    return [owner.register_forward_pre_hook(lend), owner.register_forward_hook(restore, always_call=True)]


class InPlace(Part):
    """Parameters of the model trained under their own names, in float32 or wider.

    With ``keep`` the originals stay in memory (for few parameters). Without, the model's own tensors are trained with no copy, and the originals are
    read again through ``source`` when the base is needed; the engine sets it. The gate is 0 or 1.
    """

    gate_is_switch = True
    source: Source | None = None

    def __init__(self, model: nn.Module, names: list[str], keep: bool) -> None:
        super().__init__()
        self.names, self.keep, self._gate = names, keep, 1.0
        uses = list(model.named_parameters(remove_duplicate=False))
        parameters = dict(model.named_parameters())
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._hooks: list[RemovableHandle] = []
        for name in names:
            old = parameters[name]
            self._places[name] = [
                (model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n, p in uses if p is old
            ]
            self.register_parameter(
                self._key(name),
                nn.Parameter(old.detach().to(torch.promote_types(old.dtype, torch.float32), copy=keep)),
            )
            if keep:
                self.register_buffer(self._key(name) + ":original", old.detach(), persistent=False)
            if old.dtype != self.get_parameter(self._key(name)).dtype:
                self._hooks += [
                    hook
                    for owner, leaf in self._places[name]
                    for hook in _cast_while_running(owner, leaf, old.dtype)
                ]
        self._install(self.trained())

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")

    def _install(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            for owner, leaf in self._places[name]:
                owner._parameters[leaf] = parameter

    def _originals(self) -> dict[str, nn.Parameter]:
        if self.keep:
            tensors = {n: self.get_buffer(self._key(n) + ":original") for n in self.names}
        elif self.source is None:
            raise RuntimeError(
                "the base's own tensors can only be read again where the model came from a file"
            )
        else:
            device = next(self.parameters()).device
            tensors = {n: t.to(device) for n, t in self.source() if n in self._places}
        return {n: nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}

    @property
    def gate(self) -> float:  # a property, because switching moves tensors
        return self._gate

    @gate.setter
    def gate(self, value: float) -> None:
        if value not in (0.0, 1.0):
            raise ValueError(f"parameters trained in place are on (1) or off (0), not {value}")
        if value != self._gate:
            self._install(self.trained() if value else self._originals())
            self._gate = value

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters under the model's names."""
        return {n: self.get_parameter(self._key(n)) for n in self.names}

    def describe(self) -> str:
        return "parameters trained in place"

    def adapted(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def recoverable(self) -> bool:
        return self.keep

    def changes(self) -> Changes:
        return Changes(parameters=self.trained())

    def units(self) -> list[Unit]:
        return [Unit(name, name, p) for name, p in self.trained().items() if p.requires_grad]

    def use_source(self, source: Source | None) -> None:
        self.source = source

    def detach(self) -> None:
        """Give the model its originals back; the trained values stay here."""
        self.gate = 0.0
        for hook in self._hooks:
            hook.remove()
