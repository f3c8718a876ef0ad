"""BitFit: train the bias terms of the model and nothing else.

Every parameter whose name ends in ``bias`` is trained in place, including the biases of norms. The originals
stay in memory, so that the base model can be restored to the bit. The task head is trained as with every
method.

Formula:
    y = W x + b        b is trained, W is frozen

Paper: Ben Zaken, Ravfogel and Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", ACL 2022, arXiv 2106.10199.

Reading: The variant with all bias terms. There is no setting.

Rate: The rate of the paper is unverified.

Differs: The authors' code was not compared with this file. The paper's smaller variant, which trains only the
biases of the query projections and of one feed-forward layer, is left out.

Cost: One trained value per bias entry, with two moments in Adam and a copy of the original. The trained
biases are stored. Models without bias terms are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...core.inplace import InPlace, list_untrained
from ...core.method import Method
from ...errors import ConfigError
from ...registry import register


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """BitFit: all bias terms, including those of the norms."""

    family: ClassVar[str] = "selection"
    trains: ClassVar[str] = "every bias, in place"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def build(self, model: nn.Module) -> InPlace:
        names = [name for name in list_untrained(model) if name.rpartition(".")[2] == "bias"]
        if not names:
            raise ConfigError(
                f"method=bitfit: {type(model).__name__} has no bias terms to train; choose another method, "
                "for example method=lora."
            )
        return InPlace(model, names, keep=True)
