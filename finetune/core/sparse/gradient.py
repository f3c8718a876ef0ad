"""The gradient of a few entries of a weight, and those entries themselves: ``g[k] = sum_t grad_y[t, i_k] * x[t, j_k]`` for K flat positions.

Three ways, none with a temporary of a large weight's size:

- *whole*: the entries are all of a sub-matrix (rows, columns, heads, blocks): the small product is the answer;
- *sampled*: one dot product an entry, on transposed chunks of tokens that stay in cache;
- *dense*: the product in blocks of rows, each gathered at its entries.

Where the entries touch only some rows or columns the last two work inside that sub-matrix. The choice follows from sizes alone, never from timing:
the same inputs give the same bits. scripts/gradient_rule.py measures the constants, on CPUs; elsewhere no entry is sampled,
and nothing is measured yet.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

CHUNK = 200  # tokens: so many of either side stay in the cache of a core
BLOCK_ROWS = 512  # a dense block has at least so many rows, as every block reads all of ``x`` again
BLOCK = {"cpu": 2**20}  # entries of a dense block, by device type
BLOCK_ELSEWHERE = 2**24  # an accelerator needs more to be busy


@dataclass(frozen=True, eq=False)
class Layout:
    """The sub-matrix that holds the trained entries of one weight, and whether they fill it. Made again when they move."""

    rows: Tensor | None  # ascending, int64; None: all rows, or so many that choosing does not pay
    cols: Tensor | None
    full: bool  # the entries are all of ``rows`` x ``cols``

    @staticmethod
    def of(index: Tensor, shape: tuple[int, int]) -> Layout:
        """``index``: flat positions, ascending and distinct."""
        rows, cols = _taken(index // shape[1], shape[0]), _taken(index % shape[1], shape[1])
        full = len(index) == len(rows) * len(cols)

        def worth(chosen: Tensor, of: int) -> Tensor | None:
            return chosen if len(chosen) < (of if full else 3 / 4 * of) else None

        return Layout(worth(rows, shape[0]), worth(cols, shape[1]), full)

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the sub-matrix."""
        return shape[0] if self.rows is None else len(self.rows), shape[1] if self.cols is None else len(
            self.cols
        )


def _taken(numbers: Tensor, of: int) -> Tensor:
    """The distinct ``numbers`` below ``of``, ascending."""
    seen = torch.zeros(of, dtype=torch.bool, device=numbers.device)
    return seen.index_fill_(0, numbers.long(), True).nonzero().view(-1)


def used_columns(x: Tensor, layout: Layout) -> Tensor:
    """What backward needs of the input [..., in]: itself, or a copy of the columns in use. The copy must be small, as other layers may keep ``x``."""
    if layout.cols is None or 4 * len(layout.cols) > x.shape[-1]:
        return x
    return x.index_select(-1, layout.cols)


@torch.no_grad()
def entries_gradient(
    grad_y: Tensor, x: Tensor, index: Tensor, shape: tuple[int, int], layout: Layout
) -> Tensor:
    """The gradient at ``index``, [K], float32 or wider. ``grad_y``: [n, out]; ``x``: [n, in], or what ``used_columns`` returned."""
    rows, cols = size = layout.size(shape)
    kept = x.shape[1] == cols
    at = index if layout.full else _inside(index, shape, layout)
    if not layout.full and x.device.type == "cpu" and sampled_pays(rows, cols, len(index)):
        return sampled(grad_y, x, at, size, layout.rows, None if kept else layout.cols)
    return dense(grad_y, x, None if layout.full else at, size, layout.rows, None if kept else layout.cols)


def sampled_pays(rows: int, cols: int, entries: int) -> bool:
    """Whether entry by entry beats the product of all of a [rows, cols] matrix, on a CPU.

    The unit is one multiplication of the product; all costs grow with tokens alike, and shrink with threads. The transposes cost by row and column.
    """
    return 9 * entries + 190 * (rows + cols) < rows * cols


def _inside(index: Tensor, shape: tuple[int, int], layout: Layout) -> Tensor:
    """Positions in the sub-matrix of positions in the whole."""
    if layout.rows is None and layout.cols is None:
        return index

    def rank(numbers: Tensor, chosen: Tensor | None, of: int) -> Tensor:
        if chosen is None:
            return numbers
        ranks = torch.zeros(of, dtype=torch.int32, device=index.device)
        ranks[chosen] = torch.arange(len(chosen), dtype=torch.int32, device=index.device)
        return ranks.index_select(0, numbers)

    return rank(index // shape[1], layout.rows, shape[0]) * layout.size(shape)[1] + rank(
        index % shape[1], layout.cols, shape[1]
    )


def _columns(matrix: Tensor, chosen: Tensor | None) -> Tensor:
    return matrix if chosen is None else matrix.index_select(1, chosen)


def _wide(grad_y: Tensor, x: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(grad_y.dtype, x.dtype), torch.float32)


def sampled(
    grad_y: Tensor, x: Tensor, at: Tensor, size: tuple[int, int], rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """One dot product an entry of the [rows, cols] sub-matrix. Temporaries: CHUNK transposed tokens of either side, and K columns, int32."""
    _announce()
    wide = _wide(grad_y, x)
    total = torch.zeros(len(at), dtype=wide)
    starts = torch.searchsorted(at, torch.arange(size[0] + 1, dtype=at.dtype) * size[1], out_int32=True)
    pattern = torch.sparse_csr_tensor(starts, at % size[1], total, size, check_invariants=False)
    left, right = (torch.empty(CHUNK * s, dtype=wide) for s in size)
    for start in range(0, len(x), CHUNK):
        y = _columns(grad_y[start : start + CHUNK], rows).to(wide)
        z = _columns(x[start : start + CHUNK], cols).to(wide)
        yt, zt = _transposed(y, left), _transposed(z, right)
        torch.sparse.sampled_addmm(pattern, yt, zt.T, out=pattern)
    return pattern.values()


def _transposed(x: Tensor, memory: Tensor) -> Tensor:
    """``x`` [n, m] as [m, n] in ``memory``. Written as an image in channels-last order, it takes all threads; ``x.T`` is copied by one."""
    out = memory[: x.numel()].view(1, x.shape[1], 1, len(x))
    out.permute(0, 3, 1, 2).copy_(x[None, :, :, None])
    return out.view(x.shape[1], len(x))


@cache
def _announce() -> None:
    """The first CSR tensor of a process makes torch say that they are in beta state: nobody who trains can act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(0, dtype=torch.int32),
            torch.zeros(0),
            (0, 0),
            check_invariants=False,
        )


def dense(
    grad_y: Tensor,
    x: Tensor,
    at: Tensor | None,
    size: tuple[int, int],
    rows: Tensor | None,
    cols: Tensor | None,
) -> Tensor:
    """The product of the [rows, cols] sub-matrix, a block of rows at a time, gathered at ``at``; None: all of it. Temporary: a block.

    ``out=`` saves the temporary, and autocast leaves such products alone.
    """
    wide = _wide(grad_y, x)
    half = (
        wide != grad_y.dtype
        and grad_y.dtype == x.dtype
        and x.device.type == "cuda"
        and torch.version.hip is None
    )
    x = _columns(x, cols) if half else _columns(x, cols).to(wide)
    step = max(BLOCK_ROWS, BLOCK.get(x.device.type, BLOCK_ELSEWHERE) // max(size[1], 1))
    step = -(-size[0] // max(1, -(-size[0] // step)))  # blocks of equal height
    edges = [*range(0, size[0], max(step, 1)), size[0]]
    total = torch.empty(size[0] * size[1] if at is None else len(at), dtype=wide, device=x.device)
    bounds = [e * size[1] for e in edges]
    if at is not None:
        block = torch.empty(step * size[1], dtype=wide, device=x.device)
        bounds = (
            [0, len(at)]
            if len(edges) == 2
            else torch.searchsorted(at, torch.tensor(bounds, dtype=at.dtype, device=at.device)).tolist()
        )
    for top, end, first, last in zip(edges, edges[1:], bounds, bounds[1:], strict=False):
        if first == last:
            continue
        y = grad_y[:, top:end] if rows is None else grad_y.index_select(1, rows[top:end])
        part = total[first:last] if at is None else block[: (end - top) * size[1]]
        product = part.view(end - top, size[1])
        if half:  # tensor cores accumulate in float32; only this call hands that out
            torch.mm(y.T, x, out_dtype=wide, out=product)
        else:
            torch.mm(y.T.to(wide), x, out=product)
        if at is not None:
            torch.index_select(part, 0, at[first:last] - top * size[1], out=total[first:last])
    return total


def _flat(weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A flat view of the weight's storage and the positions in it; a transposed weight is stored as [in, out]."""
    if weight.is_contiguous():
        return weight.view(-1), index
    out, in_ = weight.shape
    return weight.T.view(-1), index % in_ * out + index // in_


def _whole_rows(layout: Layout) -> bool:
    return layout.full and layout.cols is None and layout.rows is not None


def read(weight: Tensor, index: Tensor, layout: Layout) -> Tensor:
    """The weight's entries at ``index``, as a new tensor."""
    if _whole_rows(layout):
        return weight.index_select(0, cast(Tensor, layout.rows)).view(-1)
    flat, at = _flat(weight, index)
    return flat.index_select(0, at)


def write_(weight: Tensor, index: Tensor, layout: Layout, values: Tensor) -> None:
    """Put ``values`` at ``index``, in place."""
    if _whole_rows(layout):
        weight.index_copy_(0, cast(Tensor, layout.rows), values.view(-1, weight.shape[1]))
    else:
        flat, at = _flat(weight, index)
        flat.index_copy_(0, at.long(), values)
