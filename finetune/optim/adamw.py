"""AdamW with an age for each entry: bias correction counts the steps of that entry alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 2**17}  # entries that are moved together: the temporaries stay in cache, by device type
CHUNK_ELSEWHERE = 2**24


class AdamW(torch.optim.AdamW):
    """torch's AdamW, fused. For the parameters ``aged`` its ``state["step"]`` has their shape; who adds entries may set it as the moments.

    m and v as ever; with the age t of an entry, this step included, p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
    """

    def __init__(self, params: Any, aged: Iterable[Tensor] = (), **settings: Any) -> None:
        super().__init__(params, fused=True, **settings)
        self.aged = list(aged)
        self._step_supports_amp_scaling = not self.aged  # fp16: gradients must come unscaled

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # gradients are set aside, so a closure cannot make them
        """Move everything that has a gradient."""
        grads = [p.grad for p in self.aged]
        for p in self.aged:
            p.grad = None
        super().step()
        for p, grad in zip(self.aged, grads, strict=True):
            p.grad = grad
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and any(p is a for a in self.aged):
                    self._move(p, p.grad, group)

    @torch.no_grad()
    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        for name in ("step", "exp_avg", "exp_avg_sq") if not state else ():
            state[name] = torch.zeros_like(p)
        size = CHUNK.get(p.device.type, CHUNK_ELSEWHERE)
        views = (
            t.view(-1).split(size) for t in (p, grad, state["step"], state["exp_avg"], state["exp_avg_sq"])
        )
        for parts in zip(*views, strict=True):
            _move_(*parts, **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})


def _move_(
    p: Tensor, grad: Tensor, age: Tensor, m: Tensor, v: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:  # fmt: skip
    age.add_(1)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    decayed = _decayed(age, betas[1])
    scale = v.sqrt().div_(decayed.neg_().sqrt_()).add_(eps)
    p.addcdiv_(m, scale.mul_(_decayed(age, betas[0], decayed)), value=lr)


def _decayed(age: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """beta^age - 1, without the cancellation of float32 at small ages."""
    return torch.mul(age, math.log(beta) if beta else -math.inf, out=out).expm1_()
