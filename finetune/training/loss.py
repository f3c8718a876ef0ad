"""The task's loss as a sum and a count, so that parts of a batch add up to exactly the whole batch's mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.encode import IGNORED, Batch


def count(batch: Batch) -> int:
    """What the loss is averaged over: examples, or scored tokens."""
    labels = batch.labels if batch.labels.ndim == 1 else batch.labels[:, 1:]
    return int((labels != IGNORED).sum())


def scored(logits: Tensor, labels: Tensor) -> Tensor:
    """The predictions that the loss is averaged over, one for each of ``count``: [places, classes], float32 or wider."""
    found = logits if labels.ndim == 1 else logits[:, :-1][labels[:, 1:] != IGNORED]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of each example, float32 [n]; language-model labels [n, length] are predicted from the token before."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    targets = labels[:, 1:]
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view_as(targets).sum(1)
