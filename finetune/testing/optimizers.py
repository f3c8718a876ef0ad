"""Check what every optimizer must guarantee: ``check_optimizer(AdamW(), lambda: LoRA(rank=4))``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..core.optimizer import Optimizer
from ..core.state import entry_stores
from ..training.session import Session
from .contract import (
    Kind,
    Make,
    Trial,
    check_base_untouched,
    check_bf16,
    check_gradients,
    check_resume,
    check_same_seed,
    run_checks,
)
from .sessions import OPTIMIZER, begin, same_values, trained_values


def check_steps(trial: Trial) -> None:
    """Micro-batches of unequal size move the trained values as the whole batch does."""
    moves = []
    for train in ({}, {"micro_batch_size": 3}):
        session = trial.begin(**train)
        session.start()
        before = trained_values(session)
        next(session.steps())
        moves.append({name: value - before[name] for name, value in trained_values(session).items()})
    for name, whole in moves[0].items():
        error = float((moves[1][name] - whole).norm())
        assert error <= 0.01 * float(whole.norm()), f"micro-batches move {name} by another step"


def check_entries(trial: Trial) -> None:
    """Entries of a sparse bank keep what the optimizer remembers of them when others join.

    The gradients are given. Those of the entries that join are 0, so the others must move as if none joined.
    """
    if not _optimizer(trial).needs_grad:
        return
    alone, joined = _train_entries(trial, join=False), _train_entries(trial, join=True)
    torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-7)


def _optimizer(trial: Trial) -> Optimizer:
    return trial.optimizer or OPTIMIZER


def _train_entries(trial: Trial, join: bool) -> Tensor:
    """Make four steps with every second entry of a bank; return its values.

    ``join``: the other entries join after two steps.
    """
    session = begin(registry.get("method", "sparse")(sparsity=0.9), optimizer=_optimizer(trial))
    session.start()
    bank: Any = entry_stores(session.states)[0]
    everything = [bank.positions(i).clone() for i in range(len(bank.sizes))]
    halves = [positions[1::2].contiguous() for positions in everything]
    bank.revise(halves, {}, "base")
    for step in range(4):
        if join and step == 2:
            bank.revise(everything, session.run.moments(bank.values), "base")
        generator = torch.Generator().manual_seed(step)
        grad = torch.zeros_like(bank.values)
        for i, (start, end) in enumerate(pairwise(bank.bounds())):
            of_site = torch.randn(bank.sizes[i], generator=generator)
            trained = torch.isin(bank.positions(i), halves[i])
            grad[start:end] = of_site[bank.positions(i).long()] * trained
        bank.values.grad = grad
        session._step_optimizer([])
    kept = []
    for i, positions in enumerate(halves):
        kept.append(bank.slice(i)[torch.isin(bank.positions(i), positions)])
    return torch.cat(kept).detach()


def check_fp16(trial: Trial) -> None:
    """A step whose gradients overflow in float16 ends as one that began with half the loss scale.

    An optimizer that needs no gradient leaves the loss scale alone, and its step does not depend on it.
    """
    needs_grad, scales = _optimizer(trial).needs_grad, (2.0**16, 2.0**15)
    first, second = (trial.begin(loss_scale=scale) for scale in scales)
    if needs_grad:
        _make_overflow(first, most=scales[1])
    for session, scale in zip((first, second), scales, strict=True):
        session.start()
        next(session.steps())
        left = session.accelerator.scaler.get_scale()
        assert left == (scales[1] if needs_grad else scale), f"the loss scale is {left}"
        assert all(value.isfinite().all() for value in trained_values(session).values())
    same_values(first.states, second.states)


def _make_overflow(session: Session, most: float) -> None:
    """Make one gradient infinite as long as the loss scale is above ``most``."""
    real = session._backward

    def backward(micro: Any) -> float:
        loss = real(micro)
        if session.accelerator.scaler.get_scale() > most:
            gradients = [p.grad for p in session.states.parameters() if p.grad is not None]
            gradients[0].view(-1)[0] = torch.inf
        return loss

    session._backward = backward  # type: ignore[method-assign]  # the fault is planted in this session alone


CHECKS: dict[str, Callable[[Trial], None]] = {
    "gradients": check_gradients,
    "resume": check_resume,
    "same_seed": check_same_seed,
    "base_untouched": check_base_untouched,
    "steps": check_steps,
    "entries": check_entries,
    "fp16": check_fp16,
    "bf16": check_bf16,
}


def check_optimizer(optimizer: Optimizer, make: Make, kind: Kind = "vit") -> None:
    """Run every check of ``CHECKS``: train the method that ``make`` gives with ``optimizer``."""
    run_checks(CHECKS, Trial(make, kind, optimizer=optimizer))
