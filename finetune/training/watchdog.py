"""Watch a run step by step, and warn of spikes, of gradients that are 0, and of parts that do not move.

What is remembered between steps is one ``WatchRecord`` in the checkpoint, so a resumed run warns as an
uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..core.attach import parts
from ..core.sparse.switch import BITS
from ..core.state import entry_stores
from ..storage.progress import WatchRecord
from .session import Session, Step

LONGEST_WINDOW, SHORTEST_WINDOW = 32, 16  # steps that a value is compared with
SIGMAS = 8.0
MAD_TO_SIGMA = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
LOSS_FACTOR, NORM_FACTOR = 2.0, 10.0  # how many times the median a spike must reach
DEAD_STEPS = 5  # steps in a row whose gradient is 0
MOTION_STEPS = 5  # steps in which every part should have moved
SMALLEST = 1e-30  # replaces 0 in a logarithm


def observe(record: WatchRecord, session: Session, step: Step) -> list[str]:
    """Note one step in ``record``; return the warnings to give now, each kind once per run."""
    if record.phase != session.phase:
        record.phase, record.seen, record.still = session.phase, 0, None
    if record.seen == 0 or "churn" in step.metrics:  # a new phase or new entries: a model with other values
        record.first, record.losses, record.norms = None, [], []
    record.seen += 1
    checks = (
        ("loss", _check_loss(record, step)),
        ("norm", _check_norm(record, step)),
        ("dead", _check_dead(record, step)),
        ("still", _check_motion(record, session)),
    )
    new = []
    for kind, warning in checks:
        if warning and kind not in record.said:
            record.said.append(kind)
            new.append(warning)
    record.warnings += new
    return new


def is_spike(window: Sequence[float], value: float, factor: float) -> bool:
    """Return whether ``value`` stands out above the values before it; all are logarithms.

    It must exceed their median by the logarithm of ``factor`` and by 8 robust standard deviations. These are
    taken from the differences between neighbours (1.4826 times their median size, over the root of 2), so
    that a trend does not count as noise. With fewer than 16 values the answer is no. Logarithms are used
    because the noise of losses and norms grows with them.
    """
    if len(window) < SHORTEST_WINDOW:
        return False
    rise = value - statistics.median(window)
    changes = [abs(after - before) for before, after in pairwise(window)]
    sigma = MAD_TO_SIGMA * statistics.median(changes) / math.sqrt(2)
    return rise > math.log(factor) and rise > SIGMAS * sigma


def _append(window: list[float], value: float) -> None:
    window.append(value)
    del window[:-LONGEST_WINDOW]


def _check_loss(record: WatchRecord, step: Step) -> str:
    """Warn of a spike that rises above half of the loss near the start, so that much progress is lost."""
    value, window, warning = math.log(max(step.loss, SMALLEST)), record.losses, ""
    if is_spike(window, value, LOSS_FACTOR) and step.loss > (record.first or 0) / 2:
        before = math.exp(statistics.median(window))
        warning = (
            f"The loss rose to {step.loss:.3g} at step {step.number}, from about {before:.3g}. "
            "A smaller optimizer.lr or train.clip may help."
        )
    _append(window, value)
    if len(window) == SHORTEST_WINDOW and record.first is None:
        record.first = math.exp(statistics.median(window))
    return warning


def _check_norm(record: WatchRecord, step: Step) -> str:
    norm, window, warning = step.metrics.get("grad_norm", 0.0), record.norms, ""
    if not math.isfinite(norm):
        return (
            f"The gradient's norm is {norm} at step {step.number}. "
            "A smaller optimizer.lr, or train.precision=fp32, may help."
        )
    if norm:
        value = math.log(max(norm, SMALLEST))
        if is_spike(window, value, NORM_FACTOR):
            before = math.exp(statistics.median(window))
            warning = (
                f"The gradient's norm rose to {norm:.3g} at step {step.number}, from about {before:.3g}. "
                "A smaller optimizer.lr may help."
            )
        _append(window, value)
    return warning


def _check_dead(record: WatchRecord, step: Step) -> str:
    record.dead = record.dead + 1 if step.metrics.get("grad_norm") == 0 else 0
    if record.dead != DEAD_STEPS:
        return ""
    return (
        f"The gradient is 0 in the {DEAD_STEPS} steps up to {step.number}: nothing is learned. "
        "The settings may leave nothing to train."
    )


def _check_motion(record: WatchRecord, session: Session) -> str:
    """Follow which parts have not moved since the phase's first step, for the first few steps."""
    if record.seen == 1:
        record.still = checksums(moving_tensors(session.states))
    elif record.still and record.seen <= MOTION_STEPS:
        record.still = find_unmoved(record.still, session)
    if record.still and record.seen == MOTION_STEPS and not may_rest(session):
        return f"{describe_unmoved(record.still, session)} in the first {MOTION_STEPS} steps."
    return ""


def may_rest(session: Session) -> bool:
    """Return whether the method or the selector may leave some parts without a gradient."""
    return session.current.unused_parameters or session.selector.unused_parameters


def find_unmoved(still: dict[str, int], session: Session) -> dict[str, int]:
    """Return those of the checksums ``still`` whose parts have the same checksum now."""
    now = {}
    for name, tensor in moving_tensors(session.states).items():
        if name in still:
            now[name] = tensor
    unmoved = {}
    for name, checksum in checksums(now).items():
        if checksum == still[name]:
            unmoved[name] = checksum
    return unmoved


def describe_unmoved(still: dict[str, int], session: Session) -> str:
    """Say how many parts did not move, and whether the first of them got a gradient."""
    found, name = moving_tensors(session.states), next(iter(still))
    reason = ""
    if session.recipe.optimizer.needs_grad and not name.startswith("entries"):
        has_gradient = any(p is found[name] for p in session.optimizer.state)
        reason = "" if has_gradient else ", which got no gradient"
    return f"{len(still)} of {len(found)} trained parts did not move (first: {name}{reason})"


@torch.no_grad()
def moving_tensors(states: nn.Module) -> dict[str, Tensor]:
    """Return what should move, by name: each trained tensor, and each layer's slice of a store of entries."""
    divided = {id(store.values) for store in entry_stores(states)}
    found: dict[str, Tensor] = {}
    for name, parameter in states.named_parameters():
        if parameter.requires_grad and id(parameter) not in divided:
            found[name] = parameter
    for part in parts(states):
        for unit in part.units():
            if unit.span is not None and len(unit.values):
                found[unit.name] = unit.values
    return found


@torch.no_grad()
def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the sum of each tensor's elements as integers, which changes with any one of its bits."""
    sums = []
    for tensor in tensors.values():
        sums.append(tensor.detach().contiguous().view(BITS[tensor.element_size()]).sum())
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))
