"""Small pieces of linear algebra that torch lacks or does slowly."""

from __future__ import annotations

import torch
from torch import Tensor


def kth_smallest(x: Tensor, k: int) -> Tensor:
    """The k-th smallest element (k from 0) of a tensor of any shape and size, as a scalar tensor of its dtype and device.

    Exact and without a sort; ``torch.quantile`` sorts and refuses more than 2**24 elements. On the CPU numpy's selection is several times faster
    than ``torch.kthvalue``.
    """
    flat = x.detach().reshape(-1)
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        import numpy as np

        return torch.as_tensor(np.partition(flat.numpy(), k)[k], dtype=x.dtype)
    return flat.kthvalue(k + 1).values


def low_rank(w: Tensor, rank: int) -> Tensor:
    """The best approximation of ``w`` [out, in] (float32) of that rank, as a new matrix; ``w`` itself where it has no higher rank.

    From the eigenvectors of the smaller Gram matrix in float64, which is several times cheaper than a singular value decomposition.
    """
    out, in_ = w.shape
    if rank >= min(out, in_):
        return w.clone()
    wide = w.double()
    tall = out >= in_
    vectors = torch.linalg.eigh(wide.mT @ wide if tall else wide @ wide.mT).eigenvectors[:, -rank:]
    near: Tensor = wide @ vectors @ vectors.mT if tall else vectors @ (vectors.mT @ wide)
    return near.float()
