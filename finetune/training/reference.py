"""Provide the frozen models that an objective or a method compares with."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..core.attach import base, parts, trained_in_place
from ..core.objective import BASE, PREVIOUS, Need
from ..core.run import Reference, Seen
from ..data.encode import Batch
from ..errors import ConfigError
from ..models.stored import fingerprint
from .build import Pretrained
from .compute import Tuned, look, prepare_to_show


class Frozen:
    """A model that computes in eval mode and without gradient.

    ``attached``: the states whose parts are attached to ``model``. ``off``: those among them whose parts are
    switched off while the frozen model computes.
    """

    def __init__(
        self,
        model: nn.Module,
        needs: tuple[Need, ...],
        accelerator: Accelerator,
        attached: nn.Module | None = None,
        off: nn.Module | None = None,
    ) -> None:
        self.model: Any = model
        self.needs, self.accelerator, self.off = needs, accelerator, off or nn.Module()
        self.whole = Tuned(model, attached or nn.Module())  # parts with dropout have a mode, too

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Seen:
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in batch.inputs.items()}
        training = self.whole.model.training
        self.whole.eval()
        try:
            with base(self.off), self.accelerator.autocast():
                return look(self.model, self.needs, inputs)
        finally:
            self.whole.train(training)


class References:
    """The frozen models of a session, each made when it is first asked for.

    ``base`` is the model before training. If every part can be switched off, it is the tuned model without
    its parts and needs no memory; otherwise the model is read once and kept. Its head is the head in training
    with its current values, or the checkpoint's original head if the run kept that one. ``previous`` is the
    model as the previous phase left it, with the head in training.
    """

    def __init__(self, pretrained: Pretrained, accelerator: Accelerator) -> None:
        self.pretrained, self.accelerator = pretrained, accelerator
        self.states, self.needs = nn.ModuleDict(), tuple[Need, ...]()
        self._read: dict[str, nn.Module] = {}  # models with memory of their own, by name
        self._made: dict[str, Reference] = {}

    def enter(self, states: nn.ModuleDict, needs: tuple[Need, ...]) -> None:
        """Use the states of a new phase, and give what its objective needs."""
        self.states, self.needs, self._made = states, needs, {}

    def get(self, name: str) -> Reference:
        """Return a reference. Raises ``ConfigError`` if there is no such model, or if it does not fit."""
        if name not in self._made:
            if name == BASE:
                self._made[name] = self._make_base()
            elif name == PREVIOUS:
                self._made[name] = self._make_previous()
            else:
                self._made[name] = self._make_teacher(name)
        return self._made[name]

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each model that was read from a path of its own."""
        found = {}
        for name, model in self._read.items():
            if name != BASE:
                found[name] = fingerprint(model, ())
        return found

    def _make_base(self) -> Reference:
        switched = nn.ModuleDict({name: state for name, state in self.states.items() if name != "head"})
        if self._keeps_head:
            switched = self.states
        if all(part.recoverable for part in parts(switched)):
            return Frozen(self.pretrained.model, self.needs, self.accelerator, self.states, switched)
        if self.pretrained.reload is None:
            raise ConfigError("The base was trained in place, and there is no file to read it again from.")
        if BASE not in self._read:
            self._read[BASE] = self._take(self.pretrained.reload())
        model = self._read[BASE]
        if not self._keeps_head and "head" in self.states:
            for name, parameter in trained_in_place(self.states["head"]).items():
                path, _, leaf = name.rpartition(".")
                model.get_submodule(path)._parameters[leaf] = parameter
        return Frozen(model, self.needs, self.accelerator)

    def _make_previous(self) -> Reference:
        method = self.states["method"]
        if not all(part.recoverable for part in parts(method)):
            raise ConfigError(
                "objective.teacher=previous needs parts that can be switched off, and this phase trains the "
                "model's own weights in place. Take objective.teacher=base."
            )
        return Frozen(self.pretrained.model, self.needs, self.accelerator, self.states, method)

    def _make_teacher(self, path: str) -> Reference:
        if self.pretrained.read_teacher is None:
            raise ConfigError(f"There is no way to read the reference model {path} here.")
        if path not in self._read:
            self._read[path] = self._take(self.pretrained.read_teacher(path))
        return Frozen(self._read[path], self.needs, self.accelerator)

    def _take(self, model: nn.Module) -> nn.Module:
        prepare_to_show(model, self.needs)
        return model.to(self.accelerator.device).eval().requires_grad_(False)

    @property
    def _keeps_head(self) -> bool:
        return not self.pretrained.new_head
