"""Choose the best units of many weights at once, exactly, without a score tensor of the model's size.

Scores arrive weight by weight, in any order. For each group of weights that compete, only the best units so
far are kept, at 10 bytes for each unit to be chosen: an int32 key that sorts like the float32 score, an
int32 position, and a quarter more room. The threshold among them comes from a histogram of the keys in two
passes. Ties go to the earlier weight, then to the lower position, whatever the order of arrival: the result
equals that of one stable sort.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 20  # keys processed together, which bounds the memory that selection needs beside the scores
NEVER = -(2**31)  # the key of a unit that must not be chosen


def sort_keys(scores: Tensor) -> Tensor:
    """Return int32 keys [count] that sort like the float32 ``scores``, in the memory of the scores.

    Raises ``ValueError`` for NaN.
    """
    flat = scores.reshape(-1)
    keys = flat.view(torch.int32)
    for chunk, part in zip(keys.split(CHUNK), flat.split(CHUNK), strict=True):
        if part.isnan().any():
            raise ValueError("a score is NaN")
        part.add_(0.0)  # turns -0.0 into 0.0, so that their keys are equal
        chunk.bitwise_xor_((chunk >> 31).bitwise_and_(0x7FFFFFFF))
    return keys


def _chunks(arrays: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield all arrays in chunks of at most ``CHUNK`` elements."""
    for array in arrays:
        yield from array.split(CHUNK)


def _count_at_least(arrays: Iterable[Tensor], key: int) -> int:
    """Count the keys that are at least ``key``."""
    count = 0
    for chunk in _chunks(arrays):
        count += int((chunk >= key).sum())
    return count


def kth_largest(arrays: list[Tensor], k: int) -> int:
    """Return the k-th largest (k from 1) of the int32 keys of all ``arrays`` together.

    Two passes: a histogram of the upper 16 bits, then one of the lower 16 bits within the bin that was found.
    """
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in _chunks(arrays):
        upper += torch.bincount((chunk >> 16) + (1 << 15), minlength=1 << 16).cpu()
    at_least = upper.flip(0).cumsum(0).flip(0)  # keys in this bin or a higher one
    high = int((at_least >= k).nonzero().max())
    left = k - int(at_least[high] - upper[high])
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in _chunks(arrays):
        in_bin = chunk[(chunk >> 16) == high - (1 << 15)]
        lower += torch.bincount(in_bin & 0xFFFF, minlength=1 << 16).cpu()
    low = int((lower.flip(0).cumsum(0).flip(0) >= left).nonzero().max())
    return ((high - (1 << 15)) << 16) + low


class TopK:
    """Keeps the best units of several pieces (weights) that fit into one budget.

    A unit of piece i costs ``costs[i]``. Units are taken from the best down until the next one would exceed
    ``budget``. With the same cost for all, these are exactly ``budget // cost`` units, or all that there are.
    A unit that alone costs more than the budget is never taken.
    """

    def __init__(self, budget: int, costs: dict[int, int]) -> None:
        self.budget, self.costs = budget, costs
        self._pool: _Pool | None = None
        if len(set(costs.values())) == 1:
            self._pool = _Pool(budget // min(costs.values()))
        # With different costs all keys are kept. Such units are whole rows, heads or more, so they are few.
        self._keys: dict[int, Tensor] = {}

    def add(self, piece: int, scores: Tensor, allowed: Tensor | None = None) -> None:
        """Add the units of a piece by their float32 ``scores`` [units], whose memory is overwritten.

        ``allowed`` [units] bool: only these units may be taken. Raises ``ValueError`` for NaN.
        """
        keys = sort_keys(scores)
        if allowed is not None:
            keys.masked_fill_(~allowed.reshape(-1), NEVER)
        if self._pool:
            self._pool.add(piece, keys)
        elif self.costs[piece] <= self.budget:
            self._keys[piece] = keys
        else:
            self._keys[piece] = torch.full_like(keys, NEVER)

    def take(self) -> dict[int, Tensor]:
        """Return the units taken from each piece, int32, ascending. Nothing can be added afterwards."""
        if self._pool:
            return self._pool.take()
        return self._take_by_cost()

    def _take_by_cost(self) -> dict[int, Tensor]:
        """Take units of different costs by one stable sort of all keys."""
        pieces = sorted(self._keys)
        keys = torch.cat([self._keys[p].cpu() for p in pieces])
        costs = torch.cat([torch.full((len(self._keys[p]),), self.costs[p]) for p in pieces])
        order = keys.sort(descending=True, stable=True).indices[: int((keys > NEVER).sum())]
        best = order[costs[order].cumsum(0) <= self.budget]
        taken = torch.zeros(len(keys), dtype=torch.bool).index_fill_(0, best, True)
        found, start = {}, 0
        for piece in pieces:
            own = self._keys[piece]
            found[piece] = taken[start : start + len(own)].nonzero().view(-1).to(own)
            start += len(own)
        return found


class _Pool:
    """Keeps the ``k`` best keys of all pieces.

    It has room for a quarter more, so that most pieces can be added without removing keys of earlier
    ones.
    """

    def __init__(self, k: int) -> None:
        self.k, self.used = k, 0
        self.floor = NEVER + 1  # smaller keys cannot be among the best any more
        self.ends: dict[int, tuple[int, int]] = {}  # the slice of each piece, in the order of arrival
        self.keys = self.index = torch.empty(0, dtype=torch.int32)

    def add(self, piece: int, keys: Tensor) -> None:
        """Add the keys of a piece that may be among the ``k`` best."""
        if not len(self.keys):
            room = self.k + self.k // 4
            self.keys = torch.empty(room, dtype=torch.int32, device=keys.device)
            self.index = torch.empty_like(self.keys)
        if self.used + _count_at_least([keys], self.floor) <= len(self.keys):
            self._append(piece, keys, None, self.floor, len(keys))
        elif self.k:
            self._trim({piece: keys})
        else:
            self.ends[piece] = 0, 0

    def _trim(self, new: dict[int, Tensor]) -> None:
        """Keep the ``k`` best of the keys in the pool and of the ``new`` pieces."""
        pooled = {piece: self.keys[start:end] for piece, (start, end) in self.ends.items()}
        every = pooled | new
        self.floor = kth_largest(list(every.values()), self.k)
        ties = self.k - _count_at_least(every.values(), self.floor + 1)
        quota = {}
        for piece in sorted(every):
            equal = sum(int((chunk == self.floor).sum()) for chunk in _chunks([every[piece]]))
            quota[piece] = min(ties, equal)
            ties -= quota[piece]
        self.used = 0
        # The pooled keys only move towards the front, so none is overwritten before it is read.
        for piece, keys in pooled.items():
            start, end = self.ends[piece]
            self._append(piece, keys, self.index[start:end], self.floor, quota[piece])
        for piece, keys in new.items():
            self._append(piece, keys, None, self.floor, quota[piece])

    def _append(self, piece: int, keys: Tensor, index: Tensor | None, floor: int, ties: int) -> None:
        """Append the keys above ``floor`` and the first ``ties`` of those equal to it.

        ``index``: the positions of the keys in their piece; None: the keys are the whole piece.
        """
        start = self.used
        for i, chunk in enumerate(keys.split(CHUNK)):
            stays = chunk > floor
            equal = (chunk == floor).nonzero().view(-1)[:ties]
            stays[equal] = True
            ties -= len(equal)
            at = stays.nonzero().view(-1)
            target = slice(self.used, self.used + len(at))
            self.keys[target] = chunk[at]
            if index is None:
                self.index[target] = at + i * CHUNK
            else:
                self.index[target] = index[i * CHUNK : (i + 1) * CHUNK][at]
            self.used += len(at)
        self.ends[piece] = start, self.used

    def take(self) -> dict[int, Tensor]:
        """Return the positions of the best keys of each piece."""
        if self.used > self.k:
            self._trim({})
        self.keys = self.keys[:0].clone()  # a view would keep all of the memory alive; likewise below
        return {piece: self.index[start:end].clone() for piece, (start, end) in self.ends.items()}


def apportion(total: int, weights: Tensor, caps: list[int]) -> list[int]:
    """Divide ``total`` into n whole numbers in proportion to ``weights`` [n], none above its cap.

    The parts add up to ``total``; the method of the largest remainder rounds them. What exceeds a cap goes to
    the other parts. Weights that are all 0 count as equal. Raises ``ValueError`` if the caps add up to less
    than ``total``, and for a weight that is negative or not finite.
    """
    limit, share = torch.tensor(caps, dtype=torch.int64), weights.double().cpu()
    if total > int(limit.sum()):
        raise ValueError(f"{total} do not fit into {int(limit.sum())}")
    if not (share.isfinite() & (share >= 0)).all():
        raise ValueError("a weight is negative or not finite")
    given, open_ = torch.zeros_like(limit), limit > 0
    while left := total - int(given.sum()):
        live = torch.where(open_, share, 0.0)
        if not float(live.sum()) > 0:
            live = open_.double()
        exact = live / live.sum() * left
        full = open_ & (exact >= limit)
        if full.any():
            given, open_ = torch.where(full, limit, given), open_ & ~full
        else:
            more = exact.floor().long()
            more[(exact - more).sort(descending=True, stable=True).indices[: left - int(more.sum())]] += 1
            given += more
    return given.tolist()
