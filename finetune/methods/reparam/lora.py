"""LoRA: a trained low-rank change of each weight.

Two factors are added to every chosen layer. B starts at 0, so the output at step 0 is that of the base model.
The change is applied to the input as two small products and never formed as a matrix, except for merging.

Formula:
    W' = W + (alpha / rank) B A        A: [rank, in], B: [out, rank]
    y = W x + (alpha / rank) B A dropout(x)

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.

Reading: A starts from Kaiming's uniform initialization with a = sqrt(5), which is uniform in +-1/sqrt(in),
and B from 0. All linear layers of the blocks are adapted; the paper adapts the query and value projections,
which is ``method.targets=[q,v]``. rank = 8 and alpha = 16 are those of the released script for RoBERTa base
on MNLI.

Rate: The released script for RoBERTa base on MNLI has 5e-4.

Differs: The authors' code was not compared with this file. A test trains it beside the LoRA of
huggingface/peft, from the same factors, and expects the same output.

Cost: rank (in + out) trained values per layer, their gradients and two moments in Adam. The factors are
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from ...core.lowrank import LowRank
from ...core.method import Reparam
from ...core.site import Site
from ...registry import register


@register("lora")
@dataclass(frozen=True)
class LoRA(Reparam):
    """LoRA: a trained low-rank change of each weight.

    Options:
        rank: Rank of the change.
        alpha: Scale of the change; it is multiplied by alpha / rank.
        dropout: Probability that an entry of the branch's input is dropped in training.
    """

    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = "two factors of rank r per layer"
    paper: ClassVar[str] = "arXiv 2106.09685"
    size: ClassVar[str] = "rank"

    def delta(self, site: Site) -> LowRank:
        return LowRank(site.shape, self.rank, self.alpha, self.dropout)
