"""Choose the best entries of many weights at once, exactly, without a score tensor of the model's size.

Scores arrive weight by weight, in any order. Per group of weights that compete (the *scope*) only the best so far are held, 10 bytes for each one
that is wanted: int32 keys that sort like the float32 scores and int32 positions, with some room. The threshold among them comes from a two-pass
histogram of the keys. Equal scores are won by the earlier weight, then by the lower position, whatever the order of arrival: the result is that of
one stable sort.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 20  # keys that are looked at together: bounds what selection needs beside the scores
NEVER = -(2**31)  # the key of what must not be chosen


def sort_keys(scores: Tensor) -> Tensor:
    """int32 keys that order as the float32 ``scores`` do; made in their memory. Raises ``ValueError`` for NaN."""
    flat = scores.reshape(-1)
    keys = flat.view(torch.int32)
    for chunk, part in zip(keys.split(CHUNK), flat.split(CHUNK), strict=True):
        if part.isnan().any():
            raise ValueError("a score is NaN")
        part.add_(0.0)  # -0.0 and 0.0 are equal
        chunk.bitwise_xor_((chunk >> 31).bitwise_and_(0x7FFFFFFF))
    return keys


def _parts(arrays: list[Tensor]) -> Iterator[Tensor]:
    for array in arrays:
        yield from array.split(CHUNK)


def kth_largest(arrays: list[Tensor], k: int) -> int:
    """The k-th largest (from 1) of the int32 keys in all ``arrays``: by a histogram of the upper 16 bits, then of the lower 16 in the bin found."""
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for part in _parts(arrays):
        upper += torch.bincount((part >> 16) + (1 << 15), minlength=1 << 16).cpu()
    above = upper.flip(0).cumsum(0).flip(0)  # keys in this bin or a higher one
    high = int((above >= k).nonzero().max())
    left = k - int(above[high] - upper[high])
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for part in _parts(arrays):
        lower += torch.bincount(part[(part >> 16) == high - (1 << 15)] & 0xFFFF, minlength=1 << 16).cpu()
    low = int((lower.flip(0).cumsum(0).flip(0) >= left).nonzero().max())
    return ((high - (1 << 15)) << 16) + low


class TopK:
    """The best of a budget's worth of units among pieces that ``add`` brings one by one.

    A unit of piece i costs ``costs[i]``. Units are taken from the best down until the next one would exceed ``budget``: with one cost for all,
    exactly ``budget // cost`` of them, or all there are. What alone costs more than the budget is not on offer.
    """

    def __init__(self, budget: int, costs: dict[int, int]) -> None:
        self.budget, self.costs = budget, costs
        self._pool: _Pool | None = (
            _Pool(budget // min(costs.values())) if len(set(costs.values())) == 1 else None
        )
        self._all: dict[
            int, Tensor
        ] = {}  # the keys of units of different costs: whole rows, heads or more, so that there are few

    def add(self, piece: int, scores: Tensor, allowed: Tensor | None = None) -> None:
        """Offer the units of a piece: float32 ``scores`` [units], whose memory is used up. ``allowed`` [units] bool: the others are not on offer."""
        keys = sort_keys(scores)
        if allowed is not None:
            keys.masked_fill_(~allowed.reshape(-1), NEVER)
        if self._pool:
            self._pool.add(piece, keys)
        else:
            self._all[piece] = keys if self.costs[piece] <= self.budget else torch.full_like(keys, NEVER)

    def take(self) -> dict[int, Tensor]:
        """The chosen units of each piece, int32, ascending; nothing can be added any more."""
        return self._pool.take() if self._pool else self._prefix()

    def _prefix(self) -> dict[int, Tensor]:
        pieces = sorted(self._all)
        keys = torch.cat([self._all[p].cpu() for p in pieces])
        costs = torch.cat([torch.full((len(self._all[p]),), self.costs[p]) for p in pieces])
        order = keys.sort(descending=True, stable=True).indices[: int((keys > NEVER).sum())]
        best = order[costs[order].cumsum(0) <= self.budget]
        chosen = (
            torch.zeros(len(keys), dtype=torch.bool)
            .index_fill_(0, best, True)
            .split([len(self._all[p]) for p in pieces])
        )
        return {p: c.nonzero().view(-1).to(self._all[p]) for p, c in zip(pieces, chosen, strict=True)}


class _Pool:
    """The ``k`` best keys of all pieces, with room for a quarter more, so that most pieces are added without a look at the whole."""

    def __init__(self, k: int) -> None:
        self.k, self.used = k, 0
        self.floor = NEVER + 1  # smaller keys cannot be among the best any more
        self.ends: dict[int, tuple[int, int]] = {}  # where each piece lies, in the order of arrival
        self.keys = self.index = torch.empty(0, dtype=torch.int32)

    def add(self, piece: int, keys: Tensor) -> None:
        if not len(self.keys):
            self.keys, self.index = (
                torch.empty(self.k + self.k // 4, dtype=torch.int32, device=keys.device) for _ in range(2)
            )
        if self.used + sum(int((part >= self.floor).sum()) for part in _parts([keys])) <= len(self.keys):
            self._append(piece, keys, None, self.floor, len(keys))
        elif self.k:
            self._trim({piece: keys})
        else:
            self.ends[piece] = 0, 0

    def _trim(self, new: dict[int, Tensor]) -> None:
        """Keep the ``k`` best of what is here and of the ``new`` pieces."""
        here = {p: self.keys[a:b] for p, (a, b) in self.ends.items()}
        every = here | new
        self.floor = kth_largest(list(every.values()), self.k)
        ties = self.k - sum(int((part > self.floor).sum()) for part in _parts(list(every.values())))
        quota = {}
        for piece in sorted(every):
            quota[piece] = min(ties, sum(int((part == self.floor).sum()) for part in _parts([every[piece]])))
            ties -= quota[piece]
        self.used = 0
        for (
            piece,
            keys,
        ) in here.items():  # to the front, each no further than it lies: nothing is overwritten unread
            a, b = self.ends[piece]
            self._append(piece, keys, self.index[a:b], self.floor, quota[piece])
        for piece, keys in new.items():
            self._append(piece, keys, None, self.floor, quota[piece])

    def _append(self, piece: int, keys: Tensor, index: Tensor | None, cut: int, ties: int) -> None:
        """Put the keys above ``cut`` and the first ``ties`` of those equal to it at the end."""
        start = self.used
        for i, part in enumerate(keys.split(CHUNK)):
            stays = part > cut
            equal = (part == cut).nonzero().view(-1)[:ties]
            stays[equal], ties = True, ties - len(equal)
            at = stays.nonzero().view(-1)
            to = slice(self.used, self.used + len(at))
            self.keys[to] = part[at]
            self.index[to] = at + i * CHUNK if index is None else index[i * CHUNK : (i + 1) * CHUNK][at]
            self.used += len(at)
        self.ends[piece] = start, self.used

    def take(self) -> dict[int, Tensor]:
        if self.used > self.k:
            self._trim({})
        self.keys = self.keys[:0].clone()  # a view would hold the memory of the whole, as it would below
        return {piece: self.index[a:b].clone() for piece, (a, b) in self.ends.items()}


def apportion(total: int, weights: Tensor, caps: list[int]) -> list[int]:
    """Divide ``total`` in proportion to ``weights`` [n] (not negative), nobody above its cap: whole numbers with the exact sum, by largest remainder.

    What a full one cannot take goes to the others. Raises ``ValueError`` where the caps do not hold ``total``. Weights that are all 0 count as equal.
    """
    limit, share = torch.tensor(caps, dtype=torch.int64), weights.double().cpu()
    if total > int(limit.sum()):
        raise ValueError(f"{total} do not fit into {int(limit.sum())}")
    if not (share.isfinite() & (share >= 0)).all():
        raise ValueError("a weight is negative or not finite")
    given, open_ = torch.zeros_like(limit), limit > 0
    while left := total - int(given.sum()):
        live = torch.where(open_, share, 0.0)
        live = live if float(live.sum()) > 0 else open_.double()
        exact = live / live.sum() * left
        full = open_ & (exact >= limit)
        if full.any():
            given, open_ = torch.where(full, limit, given), open_ & ~full
        else:
            more = exact.floor().long()
            more[(exact - more).sort(descending=True, stable=True).indices[: left - int(more.sum())]] += 1
            given += more
    return given.tolist()
