"""The optimizer over the trained tensors, and its rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..core.optimizer import Optimizer
from ..core.part import parts
from ..core.state import entry_stores


def rate(settings: Optimizer, step: int, steps: int) -> float:
    """The share of ``lr`` at ``step`` (from 0): linear warm-up, then cosine or linear to zero, or constant."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if settings.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    return 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(states: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Over the trained tensors. Vectors (biases, norms) and some parts do not decay; a bank's values do: towards the pretrained weight."""
    stores = entry_stores(states)
    entries = {id(store.values) for store in stores}
    trained = [p for p in states.parameters() if p.requires_grad]
    spared = {id(p) for part in parts(states) if not part.decays for p in part.parameters()}
    decays = [p for p in trained if (p.ndim > 1 or id(p) in entries) and id(p) not in spared]
    rest = [p for p in trained if all(p is not d for d in decays)]
    groups = [
        {"params": decays, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return settings.make(groups, states)
