"""What entries are chosen by. A score sees one weight at a time and gives a float32 number for each of its entries; one axis of the sparse engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..linalg import low_rank
from ..part import Patched

Needs = Literal["weight", "gradient", "squares", "batch squares"]


@dataclass(frozen=True)
class Look:
    """One site as a score sees it. ``grad`` [out, in]: what the score needs of the gradients; ``trained``: the weight at the end of a dense phase."""

    layer: Patched
    generator: torch.Generator
    grad: Tensor | None = None
    trained: Tensor | None = None

    def weight(self) -> Tensor:
        """A new float32 copy of the weight as it is now, [out, in]."""
        return (
            self.layer.weight.float() if self.trained is None else self.trained.to(torch.float32, copy=True)
        )

    @property
    def seen(self) -> Tensor:
        """``grad``, which the score may overwrite."""
        assert self.grad is not None
        return self.grad


@dataclass(frozen=True)
class Score:
    """A score's function of a look and of the method's settings, what it needs, and which of the optional settings it uses."""

    of: Callable[[Look, Any], Tensor]
    needs: Needs = "weight"
    uses: tuple[str, ...] = ()


def _random(look: Look, method: Any) -> Tensor:
    drawn = torch.rand(look.layer.original.shape, generator=look.generator)
    return drawn.to(look.layer.original.device)


def _magnitude(look: Look, method: Any) -> Tensor:
    """|w|."""
    return look.weight().abs_()


def _change(look: Look, method: Any) -> Tensor:
    """|w - w_0|, the movement since the start (LT-SFT, arXiv 2110.07560)."""
    return look.weight().sub_(look.layer.original.float()).abs_()


def _gradient(look: Look, method: Any) -> Tensor:
    """|g|."""
    return look.seen.abs_()


def _gradient_weight(look: Look, method: Any) -> Tensor:
    """g w, with its sign: to first order, the loss that is lost by setting w to 0, times -1."""
    return look.seen.mul_(look.weight())


def _snip(look: Look, method: Any) -> Tensor:
    """|g w| (Lee et al., 2019, arXiv 1810.02340)."""
    return look.seen.mul_(look.weight()).abs_()


def _squares(look: Look, method: Any) -> Tensor:
    """The sum of squares as it comes: of each example's gradient (Fisher), or of each batch's (SPT's sensitivity, arXiv 2303.08566)."""
    return look.seen


def _d3(look: Look, method: Any) -> Tensor:
    """|g| / (|w| + eps)^power (ID3, arXiv 2408.14470)."""
    return look.seen.abs_().div_(look.weight().abs_().add_(method.eps).pow_(method.power))


def _lowrank_magnitude(look: Look, method: Any) -> Tensor:
    """|W_R|, W_R the best approximation of rank R = ``rank`` (LIFT, arXiv 2506.00772): the principal weights are the largest."""
    return low_rank(look.weight(), method.rank).abs_()


def _off_principal(look: Look, method: Any) -> Tensor:
    """Minus the better of an entry's places in the ascending orders of |w| and |W_R|.

    The largest K are the union of the a smallest by |w| and the a smallest by |W_R|, for the a whose union has K entries: the "safe" mask of arXiv
    2511.08567, M_low united with the complement of M_princ.
    """
    w = look.weight()
    best = _places(low_rank(w, method.rank).abs_())
    return torch.minimum(best, _places(w.abs_())).neg_()


def _places(x: Tensor) -> Tensor:
    """The place of each entry in ascending order, ties by position, float32 in steps that it can tell apart (2**24)."""
    order = x.reshape(-1).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return place.view(x.shape).float()


SCORES: dict[str, Score] = {
    "random": Score(_random),
    "magnitude": Score(_magnitude),
    "change": Score(_change),
    "gradient": Score(_gradient, "gradient", ("batches",)),
    "gradient_weight": Score(_gradient_weight, "gradient", ("batches",)),
    "snip": Score(_snip, "gradient", ("batches",)),
    "fisher": Score(_squares, "squares", ("batches",)),
    "sensitivity": Score(_squares, "batch squares", ("batches",)),
    "d3": Score(_d3, "gradient", ("batches", "power", "eps")),
    "lowrank_magnitude": Score(_lowrank_magnitude, uses=("rank",)),
    "principal": Score(_lowrank_magnitude, uses=("rank",)),
    "off_principal": Score(_off_principal, uses=("rank",)),
}
