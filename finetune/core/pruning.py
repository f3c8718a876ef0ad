"""Prune weights by a score: choose the entries with the smallest scores, and set them to 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from .passes import Pass, Pruned
from .site import Site

Scope = Literal["matrix", "row"]


def smallest(score: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` smallest entries of each row of ``score``, [rows, entries].

    Among equal entries the first ones are taken, so the mask of a smaller count is a subset of this one.
    """
    order = score.sort(dim=1, stable=True).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


@dataclass(frozen=True)
class Pruning(Pass):
    """Base of the passes that set the entries with the smallest scores to 0 and keep all others to the bit.

    Options:
        sparsity: Share of the entries that become 0, rounded down to whole entries. Either this or
            ``pattern`` is given.
        pattern: ``n:m``: the n smallest of each m consecutive inputs become 0, as in ``2:4``.
        scope: With ``sparsity``, the entries that are compared with each other: those of a ``matrix`` or
            those of a ``row`` (one output). ``null`` takes the scope that the paper uses.
    """

    verb: ClassVar[str] = "prune"
    idempotent: ClassVar[bool] = True
    paper_scope: ClassVar[Scope] = "matrix"

    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    pattern: str | None = None
    scope: Scope | None = None

    def faults(self, sites: Sequence[Site]) -> list[str]:
        """Return why the settings make no sense for these sites, one sentence for each fault."""
        if self.pattern is None:
            if self.sparsity is None:
                return ["How much is pruned is not set. Add sparsity=0.5 or pattern=2:4."]
            return []
        found = []
        if self.sparsity is not None:
            found.append(
                f"sparsity={self.sparsity} has no effect with pattern={self.pattern}, which says how much is "
                "pruned. Leave one of them out."
            )
        if self.scope is not None:
            found.append(
                f"scope={self.scope} has no effect with pattern={self.pattern}, which compares the entries "
                "of each group. Leave one of them out."
            )
        if not re.fullmatch(r"\d{1,4}:\d{1,4}", self.pattern) or self._zeros_of() not in range(1, self._m()):
            found.append(f"pattern={self.pattern} is not of the form n:m with 0 < n < m, as in 2:4.")
            return found
        for site in sites:
            if site.shape[1] % self._m():
                found.append(
                    f"pattern={self.pattern}: the {site.shape[1]} inputs of {site.name} are no multiple of "
                    f"{self._m()}. Choose another pattern, or leave the layer out of targets."
                )
        return found

    def _zeros_of(self) -> int:
        """Return n of n:m."""
        return int((self.pattern or "").partition(":")[0])

    def _m(self) -> int:
        return int((self.pattern or "").partition(":")[2])

    def prune(self, weight: Tensor, score: Tensor) -> Pruned:
        """Set the entries of ``weight`` [out, in] with the smallest scores [out, in] to 0."""
        if self.pattern is not None:
            rows, count = score.reshape(-1, self._m()), self._zeros_of()
        else:
            assert self.sparsity is not None
            rows = score if (self.scope or self.paper_scope) == "row" else score.reshape(1, -1)
            count = int(rows.shape[1] * self.sparsity)
        zeros = smallest(rows, count).reshape(weight.shape)
        return Pruned(weight.masked_fill(zeros, 0), zeros)
