"""The base of all scores: a score is the number by which trained entries are chosen.

A score is a class with ``@register("name")``, in ``finetune/scores`` or in the file of the only method that
uses it. It is called with one site at a time and with the method, whose settings it may read, and returns a
float32 number for each entry of the site's weight. The engine trains the entries with the largest numbers, or
with the smallest (``direction=smallest``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ... import registry
from ..layer import Patched

Needs = Literal["weight", "gradient", "squares", "batch squares"]
ScoreName = Annotated[str, registry.Named("score")]


@dataclass(frozen=True)
class ScoredSite:
    """One site as a score sees it.

    ``grad`` [out, in]: what the score ``needs`` of the gradients. ``trained`` [out, in]: the weight at the
    end of a dense phase, where there was one.
    """

    layer: Patched
    generator: torch.Generator
    grad: Tensor | None = None
    trained: Tensor | None = None

    def weight(self) -> Tensor:
        """Return a new float32 copy of the weight as it is now, [out, in]."""
        if self.trained is None:
            return self.layer.weight.float()
        return self.trained.to(torch.float32, copy=True)

    def gradient(self) -> Tensor:
        """Return ``grad``, which the score may overwrite."""
        assert self.grad is not None
        return self.grad


class Score:
    """Base of all scores.

    ``needs``: the weight alone, the ``gradient`` summed over batches, or a sum of squared gradients: those of
    single examples (``squares``) or of whole batches (``batch squares``). ``uses``: which of the method's
    settings ``batches``, ``rank``, ``power`` and ``eps`` the score reads; the engine refuses values for the
    others. ``signed``: whether a score may be negative; budgets cannot be divided in proportion to its mean.
    """

    KIND: ClassVar[str] = "score"
    name: ClassVar[str]
    needs: ClassVar[Needs] = "weight"
    uses: ClassVar[tuple[str, ...]] = ()
    signed: ClassVar[bool] = False

    def __call__(self, site: ScoredSite, method: Any) -> Tensor:
        """Return the score of every entry, [out, in]."""
        raise NotImplementedError


def score_named(name: str) -> Score:
    """Return the registered score ``name``; raises ``ConfigError`` naming the known ones."""
    score: Score = registry.get("score", name)()
    return score


def settings_used() -> dict[str, tuple[str, ...]]:
    """Return, for each registered score, which optional settings of the method it uses."""
    return {name: entry.facts.get("uses", ()) for name, entry in registry.catalog("score").items()}
