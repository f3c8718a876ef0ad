"""The interface of a structure: a linear layer that is stored as other tensors than one weight.

A model folder names the structure of each such layer in ``finetune/structure.json``, by a registered name
and by sizes (``finetune/models/sidecar.py``). Nothing else of a structure is stored: its class says which
tensors it has and how they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Structure:
    """Base of all structures. Fields are sizes: whole numbers of at least 1, and booleans.

    ``inputs``, ``outputs``, ``bias``: of the linear layer that the structure replaces. ``BIAS``: the
    parameter that is the bias of that layer.
    """

    KIND: ClassVar[str] = "structure"
    name: ClassVar[str]
    BIAS: ClassVar[str]

    inputs: int
    outputs: int
    bias: bool

    def faults(self) -> list[str]:
        """Return why the sizes make no sense together, one clause for each fault."""
        return []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter by name, computed from the sizes alone."""
        raise NotImplementedError

    def build(self) -> StructuredLinear:
        """Return the module, with the parameters that ``shapes`` names and without buffers."""
        raise NotImplementedError

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the tensors that approximate ``weight`` [out, in], in its dtype; all but the bias.

        The result must follow from the arguments alone.
        """
        raise NotImplementedError

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [out, in] that the tensors stand for, in float64."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int | bool]:
        """Return the fields by name."""
        return asdict(self)


class StructuredLinear(nn.Module):
    """Base of the modules that structures build: they map [..., in] to [..., out]."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """Return the weight [out, in] that the tensors stand for, as a new tensor of their dtype.

        transformers looks at the weights of some layers when it loads a model.
        """
        tensors = dict(self.named_parameters())
        return self.structure.dense(tensors).to(next(iter(tensors.values())).dtype)


def structures_of(model: nn.Module) -> dict[str, Structure]:
    """Return the structures of a model by the names of their modules."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            found[name] = module.structure
    return found


@dataclass(frozen=True)
class Structured:
    """What a pass makes of a weight where it replaces it: a structure and its tensors, without the bias."""

    structure: Structure
    tensors: Mapping[str, Tensor]

    def dense(self) -> Tensor:
        """Return the weight [out, in] in float64."""
        return self.structure.dense(self.tensors)
