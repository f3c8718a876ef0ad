"""The gradient of a few entries of a weight, and reading and writing those entries.

For K flat positions (i_k, j_k) of a weight [out, in] the gradient is ``g[k] = sum_t grad_y[t, i_k] * x[t,
j_k]``. It is computed in one of three ways, none of which allocates as much memory as a large weight takes.

- *whole*: the entries fill a sub-matrix (rows, columns, heads, blocks), which one product computes;
- *sampled*: one dot product per entry, on transposed chunks of tokens that stay in cache;
- *dense*: the product in blocks of rows, gathered at the entries of each block.

If the entries touch only some rows or columns, the last two work inside that sub-matrix. The choice depends
on sizes and never on timing, so the same inputs give the same bits. scripts/gradient_rule.py measures the
constants on CPUs. On other devices no entry is sampled, and nothing has been measured yet.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

CHUNK = 200  # tokens per step: their inputs and gradients fit into the cache of a core
BLOCK_ROWS = 512  # least height of a dense block, since every block reads all of ``x`` again
BLOCK = {"cpu": 2**20}  # entries of a dense block, by device type
BLOCK_ELSEWHERE = 2**24  # larger, to keep an accelerator busy


@dataclass(frozen=True, eq=False)
class Layout:
    """The sub-matrix that holds the trained entries of one weight. It is made again when entries move."""

    rows: Tensor | None  # ascending, int64; None: selecting rows does not pay, as they are all or nearly all
    cols: Tensor | None
    full: bool  # whether the entries fill ``rows`` x ``cols``

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the number of rows and columns of the sub-matrix of a weight of ``shape``."""
        rows = shape[0] if self.rows is None else len(self.rows)
        cols = shape[1] if self.cols is None else len(self.cols)
        return rows, cols


def make_layout(index: Tensor, shape: tuple[int, int]) -> Layout:
    """Find the sub-matrix of the entries at the flat positions ``index``, ascending and distinct."""
    rows, cols = _distinct(index // shape[1], shape[0]), _distinct(index % shape[1], shape[1])
    full = len(index) == len(rows) * len(cols)
    return Layout(_if_selecting_pays(rows, shape[0], full), _if_selecting_pays(cols, shape[1], full), full)


def _if_selecting_pays(chosen: Tensor, count: int, full: bool) -> Tensor | None:
    """Return the rows or columns ``chosen`` of ``count``, or None if they are all or nearly all."""
    limit = count if full else 3 / 4 * count
    return chosen if len(chosen) < limit else None


def _distinct(numbers: Tensor, limit: int) -> Tensor:
    """Return the distinct ``numbers``, all below ``limit``, in ascending order."""
    seen = torch.zeros(limit, dtype=torch.bool, device=numbers.device)
    return seen.index_fill_(0, numbers.long(), True).nonzero().view(-1)


def used_columns(x: Tensor, layout: Layout) -> Tensor:
    """Return the part of the input [..., in] that backward needs: all of it, or a copy of the used columns.

    A copy is made only if it is small, since other layers may keep the input anyway.
    """
    if layout.cols is None or 4 * len(layout.cols) > x.shape[-1]:
        return x
    return x.index_select(-1, layout.cols)


@torch.no_grad()
def entries_gradient(
    grad_y: Tensor, x: Tensor, index: Tensor, shape: tuple[int, int], layout: Layout
) -> Tensor:
    """Compute the gradient at the positions ``index``, [K], float32 or wider.

    ``grad_y``: [n, out]. ``x``: [n, in], or what ``used_columns`` returned.
    """
    rows, cols = size = layout.size(shape)
    columns = None if x.shape[1] == cols else layout.cols  # columns that must still be selected
    if layout.full:
        return dense(grad_y, x, None, size, layout.rows, columns)
    at = _inside(index, shape, layout)
    if x.device.type == "cpu" and sampled_pays(rows, cols, len(index)):
        return sampled(grad_y, x, at, size, layout.rows, columns)
    return dense(grad_y, x, at, size, layout.rows, columns)


def sampled_pays(rows: int, cols: int, entries: int) -> bool:
    """Tell whether sampling beats the product of a [rows, cols] matrix on a CPU.

    Costs are in multiplications of the product, for one token and one thread, because all of them grow with
    the tokens and shrink with the threads alike. The transposes add a cost for each row and column.
    """
    return 9 * entries + 190 * (rows + cols) < rows * cols


def _inside(index: Tensor, shape: tuple[int, int], layout: Layout) -> Tensor:
    """Convert flat positions in the weight to flat positions in the sub-matrix."""
    if layout.rows is None and layout.cols is None:
        return index
    rows = _ranks(index // shape[1], layout.rows, shape[0])
    return rows * layout.size(shape)[1] + _ranks(index % shape[1], layout.cols, shape[1])


def _ranks(numbers: Tensor, chosen: Tensor | None, limit: int) -> Tensor:
    """Return the position of each of ``numbers`` in ``chosen``; ``numbers`` itself if ``chosen`` is None."""
    if chosen is None:
        return numbers
    ranks = torch.zeros(limit, dtype=torch.int32, device=numbers.device)
    ranks[chosen] = torch.arange(len(chosen), dtype=torch.int32, device=numbers.device)
    return ranks.index_select(0, numbers)


def _columns(matrix: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the chosen columns; None: all."""
    return matrix if chosen is None else matrix.index_select(1, chosen)


def _wide(grad_y: Tensor, x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 or wider."""
    return torch.promote_types(torch.promote_types(grad_y.dtype, x.dtype), torch.float32)


def sampled(
    grad_y: Tensor, x: Tensor, at: Tensor, size: tuple[int, int], rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """Compute one dot product for each entry of a sub-matrix of ``size``.

    Temporaries: ``CHUNK`` transposed tokens of inputs and gradients, and the column of each entry, int32.
    """
    _silence_csr_warning()
    wide = _wide(grad_y, x)
    total = torch.zeros(len(at), dtype=wide)
    starts = torch.searchsorted(at, torch.arange(size[0] + 1, dtype=at.dtype) * size[1], out_int32=True)
    pattern = torch.sparse_csr_tensor(starts, at % size[1], total, size, check_invariants=False)
    left, right = torch.empty(CHUNK * size[0], dtype=wide), torch.empty(CHUNK * size[1], dtype=wide)
    for start in range(0, len(x), CHUNK):
        y = _columns(grad_y[start : start + CHUNK], rows).to(wide)
        z = _columns(x[start : start + CHUNK], cols).to(wide)
        yt, zt = _transposed(y, left), _transposed(z, right)
        torch.sparse.sampled_addmm(pattern, yt, zt.T, out=pattern)
    return pattern.values()


def _transposed(x: Tensor, memory: Tensor) -> Tensor:
    """Write ``x`` [n, m] as [m, n] into ``memory``.

    The copy is that of an image in channels-last order, which uses all threads. Copying ``x.T`` uses one.
    """
    out = memory[: x.numel()].view(1, x.shape[1], 1, len(x))
    out.permute(0, 3, 1, 2).copy_(x[None, :, :, None])
    return out.view(x.shape[1], len(x))


@cache
def _silence_csr_warning() -> None:
    """Make the first CSR tensor of the process, for which torch warns that CSR support is in beta state."""
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
    """Compute a sub-matrix of ``size`` in blocks of rows, and return its entries ``at``; None: all of it.

    Temporary: one block. ``out=`` avoids a second one and keeps autocast from changing the dtype.
    """
    wide = _wide(grad_y, x)
    on_tensor_cores = (
        wide != grad_y.dtype
        and grad_y.dtype == x.dtype
        and x.device.type == "cuda"
        and torch.version.hip is None
    )
    x = _columns(x, cols)
    if not on_tensor_cores:
        x = x.to(wide)
    step = max(BLOCK_ROWS, BLOCK.get(x.device.type, BLOCK_ELSEWHERE) // max(size[1], 1))
    step = -(-size[0] // max(1, -(-size[0] // step)))  # blocks of equal height
    edges = [*range(0, size[0], max(step, 1)), size[0]]
    bounds = [edge * size[1] for edge in edges]  # where the results of each block start
    if at is None:
        total = torch.empty(size[0] * size[1], dtype=wide, device=x.device)
    else:
        total = torch.empty(len(at), dtype=wide, device=x.device)
        block = torch.empty(step * size[1], dtype=wide, device=x.device)
        if len(edges) == 2:
            bounds = [0, len(at)]
        else:
            bounds = torch.searchsorted(at, torch.tensor(bounds, dtype=at.dtype, device=at.device)).tolist()
    for top, end, first, last in zip(edges, edges[1:], bounds, bounds[1:], strict=False):
        if first == last:
            continue
        y = grad_y[:, top:end] if rows is None else grad_y.index_select(1, rows[top:end])
        part = total[first:last] if at is None else block[: (end - top) * size[1]]
        product = part.view(end - top, size[1])
        if on_tensor_cores:  # they accumulate in float32, which only this call returns
            torch.mm(y.T, x, out_dtype=wide, out=product)
        else:
            torch.mm(y.T.to(wide), x, out=product)
        if at is not None:
            torch.index_select(part, 0, at[first:last] - top * size[1], out=total[first:last])
    return total


def _flat(weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return a flat view of the weight's storage, [in, out] if it is transposed, and the positions in it."""
    if weight.is_contiguous():
        return weight.view(-1), index
    out, in_ = weight.shape
    return weight.T.view(-1), index % in_ * out + index // in_


def _whole_rows(layout: Layout) -> bool:
    """Tell whether the entries are whole rows, and not all of them."""
    return layout.full and layout.cols is None and layout.rows is not None


def read(weight: Tensor, index: Tensor, layout: Layout) -> Tensor:
    """Return the weight's entries at ``index`` as a new tensor."""
    if _whole_rows(layout):
        return weight.index_select(0, cast(Tensor, layout.rows)).view(-1)
    flat, at = _flat(weight, index)
    return flat.index_select(0, at)


def write_(weight: Tensor, index: Tensor, layout: Layout, values: Tensor) -> None:
    """Write ``values`` into the weight at ``index``, in place."""
    if _whole_rows(layout):
        weight.index_copy_(0, cast(Tensor, layout.rows), values.view(-1, weight.shape[1]))
    else:
        flat, at = _flat(weight, index)
        flat.index_copy_(0, at.long(), values)
