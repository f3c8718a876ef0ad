"""The settings of every method of the sparse engine: how entries are chosen, how many, and weight decay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from ..method import Method
from .schedule import Schedule
from .scores import ScoreName as ScoreName  # part of what this module offers

Direction = Literal["largest", "smallest"]
Scope = Literal["matrix", "role", "block", "model", "layer"]


@dataclass(frozen=True)
class SparseSettings(Method):
    """Declare the settings of a sparse method; ``Sparse`` adds the behaviour.

    Options:
        targets: Layers whose weights compete: roles, groups of roles, or patterns of layer names.
        sparsity: Share of the entries that is not trained. The budget K is the number of competing entries
            minus this share of it, rounded; at least one unit is trained.
        score: Score by which entries are chosen.
        direction: Whether entries with the largest or with the smallest scores are trained.
        scope: Entries that compete for one budget: those of a ``matrix``, of all matrices of one ``role``, of
            a ``block``, or of the ``model``. With ``layer`` the budget of the model is divided among the
            matrices in proportion to size times mean score, and entries compete within each matrix.
        grain: Unit that is chosen as a whole: ``element``, ``row``, ``column``, ``head``, ``matrix``,
            ``block:B`` (B x B entries) or ``N:M`` (the best N of every M inputs).
        schedule: When entries are chosen again, and how many are trained until then.
        decay: Value that weight decay pulls trained entries towards: the pretrained weight (``base``) or 0
            (``zero``).
        batches: Number of batches, one per step, from which a gradient score is computed.
        selection: Mode of the model while the gradients of a gradient score are computed: ``eval``, or
            ``train``, which uses the dropout masks of the next training step.
        rank: Rank of the approximation that ``lowrank_magnitude``, ``principal`` and ``off_principal`` use.
        power: Exponent of the weight in the score ``d3``.
        eps: Number added to the absolute weight in the score ``d3``.
    """

    targets: tuple[str, ...] = ("all",)
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.98
    score: ScoreName = "random"
    direction: Direction = "largest"
    scope: Scope = "matrix"
    grain: str = "element"
    schedule: Schedule = field(kw_only=True)
    decay: Literal["base", "zero"] = "base"
    batches: Annotated[int, Ge(1)] = 1
    selection: Literal["eval", "train"] = "eval"
    rank: Annotated[int, Ge(1)] = 64
    power: Annotated[float, Ge(0)] = 1.0
    eps: Annotated[float, Gt(0)] = 1e-3
