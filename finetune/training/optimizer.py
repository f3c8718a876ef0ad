"""Make the optimizer over the trained tensors, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..core.attach import parts
from ..core.optimizer import Optimizer
from ..core.state import entry_stores
from ..errors import ConfigError


def rate(settings: Optimizer, step: int, steps: int) -> float:
    """Return the learning rate at ``step`` (from 0) as a share of ``lr``.

    It rises linearly over the warm-up, then falls to 0 as a cosine or linearly, or stays constant.
    """
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if settings.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    return 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(states: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Make the optimizer over the trained tensors: one group with weight decay, and one without.

    Weight decay pulls matrices towards 0, and the values of a store of entries towards the pretrained
    weights. Vectors (biases, norms) do not decay, nor do parts whose ``decays`` is false. Raises
    ``ConfigError`` if an optimizer without gradients would move entries that are held at 0.
    """
    if not settings.needs_grad and any(part.count_held() for part in parts(states)):
        raise ConfigError(
            f"optimizer={settings.name} moves every value of a weight that is trained in place, and entries "
            "of this pruned model stay 0. Choose optimizer=adamw, a method such as lora, or set "
            "model.zeros=free, which lets every entry change."
        )
    entries = {id(store.values) for store in entry_stores(states)}
    spared: set[int] = set()
    for part in parts(states):
        if not part.decays:
            spared.update(id(parameter) for parameter in part.parameters())
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in states.parameters():
        if not parameter.requires_grad:
            continue
        may_decay = parameter.ndim > 1 or id(parameter) in entries
        group = decaying if may_decay and id(parameter) not in spared else others
        group.append(parameter)
    groups = []
    for params, weight_decay in ((decaying, settings.weight_decay), (others, 0.0)):
        if params:
            groups.append({"params": params, "weight_decay": weight_decay})
    return settings.make(groups, states)
