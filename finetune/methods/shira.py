"""SHiRA: train a few entries of each weight, chosen once (Bhardwaj et al., 2024, arXiv 2406.13175; here with the random mask).

The vector form: K values from 0 added to W at fixed places. peft's random mask starts from the same generator state in every run and layer; here the
run's seed draws it, and every layer gets its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..core.bank import Bank
from ..core.method import Run, Sparse
from ..core.site import find_sites
from ..registry import register


@register("shira")
@dataclass(frozen=True)
class SHiRA(Sparse):
    """SHiRA: a random, fixed set of entries of each weight."""

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "a share of the entries of each weight, chosen once"
    paper: ClassVar[str] = "arXiv 2406.13175"

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        sites = find_sites(run.model, self.targets)
        bank: Bank = state["bank"]
        chosen = [torch.randperm(s.size, generator=run.generator)[: self.count(s)] for s in sites]
        bank.place([run.agree(c.to(bank.index.device)) for c in chosen])
