"""AdamW with an age for each entry: the bias correction of an entry counts the steps of that entry alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from ..core.optimizer import Optimizer
from ..core.state import entry_stores
from ..registry import register

CHUNK = {"cpu": 2**17}  # entries updated together, by device type: the temporaries stay in cache
CHUNK_ELSEWHERE = 2**24
Rate = Annotated[float, Ge(0), Lt(1)]


@register("adamw")
@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW: moving averages of the gradient and of its square.

    Options:
        betas: Decay of the two moving averages.
        eps: Number added to the square root of the second average.
    """

    betas: tuple[Rate, Rate] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> AdamWOptimizer:
        """Return the torch optimizer; its ``aged`` parameters are the values of the stores with ages."""
        aged = [store.values for store in entry_stores(states) if store.ages]
        return AdamWOptimizer(groups, aged, lr=self.lr, betas=self.betas, eps=self.eps)


class AdamWOptimizer(torch.optim.AdamW):
    """torch's fused AdamW, in which the entries of some parameters have ages of their own.

    For the parameters ``aged``, ``state["step"]`` holds the ages, in the shape of the parameter; code that
    adds entries may set it, like the moments. The moments m and v are those of AdamW. With t, the age of an
    entry including this step: p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    """

    def __init__(self, params: Any, aged: Iterable[Tensor] = (), **settings: Any) -> None:
        super().__init__(params, fused=True, **settings)
        self.aged = list(aged)
        self._step_supports_amp_scaling = not self.aged  # with fp16, gradients must be unscaled first

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure could not set .grad
        """Update every parameter that has a gradient."""
        grads = [p.grad for p in self.aged]
        for p in self.aged:
            p.grad = None  # so that torch's step skips these parameters
        super().step()
        for p, grad in zip(self.aged, grads, strict=True):
            p.grad = grad
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and any(p is a for a in self.aged):
                    self._update(p, p.grad, group)

    @torch.no_grad()
    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p)
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        size = CHUNK.get(p.device.type, CHUNK_ELSEWHERE)
        chunks = []
        for tensor in (p, grad, state["step"], state["exp_avg"], state["exp_avg_sq"]):
            chunks.append(tensor.view(-1).split(size))
        for parts in zip(*chunks, strict=True):
            _update_(*parts, **settings)


def _update_(
    p: Tensor,
    grad: Tensor,
    age: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update one chunk of entries in place."""
    age.add_(1)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    correction = _power_minus_one(age, betas[1])
    scale = v.sqrt().div_(correction.neg_().sqrt_()).add_(eps)
    p.addcdiv_(m, scale.mul_(_power_minus_one(age, betas[0], correction)), value=lr)


def _power_minus_one(age: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """Return beta^age - 1, without the cancellation error of float32 at small ages."""
    exponent = math.log(beta) if beta else -math.inf
    return torch.mul(age, exponent, out=out).expm1_()
