"""Compute the task's loss as a sum and a count, so that parts of a batch add up to the whole batch's mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not scored


def count(labels: Tensor) -> int:
    """Return how many examples, or scored tokens, the loss is averaged over."""
    return len(scored_labels(labels))


def scored_labels(labels: Tensor) -> Tensor:
    """Return the labels that are scored, int64 [``count``]."""
    if labels.ndim == 1:
        return labels
    targets = labels[:, 1:]
    return targets[targets != IGNORED]


def scored(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits that the loss is averaged over, [``count``, classes], in float32 or wider."""
    found = logits if labels.ndim == 1 else logits[:, :-1][labels[:, 1:] != IGNORED]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's summed cross-entropy, float32 [n].

    ``labels``: classes [n], or tokens [n, length] of a language model, each predicted from the position
    before it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    targets, predictions = labels[:, 1:], logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(predictions, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).sum(1)
