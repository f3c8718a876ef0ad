"""Linear algebra that torch lacks or does slowly."""

from __future__ import annotations

import torch
from torch import Tensor


def kth_smallest(x: Tensor, k: int) -> Tensor:
    """Return the k-th smallest element (k from 0) of a tensor, as a scalar of its dtype and device.

    The result is exact. ``torch.quantile`` sorts and refuses more than 2**24 elements. On the CPU numpy's
    selection is several times faster than ``torch.kthvalue``.
    """
    flat = x.detach().reshape(-1)
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        import numpy as np

        return torch.as_tensor(np.partition(flat.numpy(), k)[k], dtype=x.dtype)
    return flat.kthvalue(k + 1).values


def low_rank(w: Tensor, rank: int) -> Tensor:
    """Compute the best approximation of ``w`` [out, in] of a given rank, float32.

    It is a copy of ``w`` if the shorter side is at most ``rank``. Otherwise it is made from the eigenvectors
    of the smaller Gram matrix in float64, which is several times cheaper than a singular value decomposition.
    """
    out, in_ = w.shape
    if rank >= min(out, in_):
        return w.clone()
    wide = w.double()
    if out >= in_:
        vectors = torch.linalg.eigh(wide.mT @ wide).eigenvectors[:, -rank:]
        approximation: Tensor = wide @ vectors @ vectors.mT
        return approximation.float()
    vectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -rank:]
    approximation = vectors @ (vectors.mT @ wide)
    return approximation.float()


def factor_low_rank(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``first`` [rank, in] and ``second`` [out, rank], float64, whose product approximates ``w`` best.

    ``rank`` is at most the shorter side of ``w`` [out, in]. The singular values, in falling order, are
    shared equally: row i of ``first`` and column i of ``second`` have the same norm.
    """
    wide, out_is_longer = w.double(), w.shape[0] >= w.shape[1]
    gram = wide.mT @ wide if out_is_longer else wide @ wide.mT
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    other = wide @ vectors if out_is_longer else wide.mT @ vectors
    values = other.norm(dim=0)  # the singular values
    roots = torch.where(values > 0, values, 1).sqrt()
    longer, shorter = other / roots, vectors * roots
    return (shorter.mT, longer) if out_is_longer else (longer.mT, shorter)
