"""BitFit: train the bias terms (Ben Zaken et al., 2022, arXiv 2106.10199; the variant with all biases)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.inplace import InPlace, untrained
from ...core.method import Method
from ...errors import ConfigError
from ...registry import register


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """BitFit: all bias terms, norms' included."""

    family: ClassVar[str] = "selection"
    trains: ClassVar[str] = "every bias, in place"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def build(self, model: nn.Module) -> InPlace:
        names = [name for name in untrained(model) if name.rpartition(".")[2] == "bias"]
        if not names:
            raise ConfigError(
                f"method=bitfit: {type(model).__name__} has no bias terms to train; choose another method, for example lora."
            )
        return InPlace(model, names, keep=True)
