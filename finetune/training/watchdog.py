"""A run watches itself: does its method act, does nothing else move, does it train as many entries as asked; and do loss and gradients stay sane.

All that is remembered between steps is one JSON object in the checkpoint, so that a resumed run says and finds what an uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.part import base, parts
from ..core.sparse.switch import BITS
from ..core.state import entry_stores
from ..models.load import fingerprint
from .prepare import Setup
from .requested import differences
from .session import Session, Step

WINDOW, LEAST = 32, 16  # steps that a value is compared with, at most and at least
SIGMAS = 8.0
LOSS, NORM = 2.0, 10.0  # how many times the median a spike must reach
DEAD = 5  # steps in a row whose gradient is 0
FEW = 5  # steps in which every part should have moved


def fresh() -> dict[str, Any]:
    """What is known before the first step."""
    return {
        "phase": None,
        "seen": 0,
        "first": None,
        "losses": [],
        "norms": [],
        "dead": 0,
        "still": None,
        "said": [],
        "warnings": [],
    }


def see(state: dict[str, Any], session: Session, step: Step) -> list[str]:
    """Take note of one step in ``state``; returns the warnings to say now, each kind once a run."""
    if state["phase"] != session.phase:
        state |= {"phase": session.phase, "seen": 0, "still": None}
    if not state["seen"] or "churn" in step.metrics:  # another model: a phase begins, or entries moved
        state |= {"first": None, "losses": [], "norms": []}
    state["seen"] += 1
    lines = [*_loss(state, step), *_norm(state, step), *_dead(state, step), *_motion(state, session, step)]
    said = [line for kind, line in lines if kind not in state["said"]]
    state["said"] += [kind for kind, _ in lines if kind not in state["said"]]
    state["warnings"] += said
    return said


def rises(window: Sequence[float], value: float, factor: float) -> bool:
    """Whether ``value`` stands out above the values before it, all of them logarithms.

    It must exceed their median by the logarithm of ``factor`` and by 8 robust standard deviations: 1.4826 times the median step,
    over the root of 2, so that a trend is no noise. With fewer than 16 values there is no telling. Logarithms, since the noise of losses and norms
    grows with them.
    """
    if len(window) < LEAST:
        return False
    rise = value - statistics.median(window)
    return rise > math.log(factor) and rise > SIGMAS * 1.4826 * statistics.median(
        abs(b - a) for a, b in pairwise(window)
    ) / math.sqrt(2)


def _keep(window: list[float], value: float) -> None:
    window.append(value)
    del window[:-WINDOW]


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))


def _loss(state: dict[str, Any], step: Step) -> Iterator[tuple[str, str]]:
    """A spike also undoes at least half of what was learned: it is above half of the loss at the start."""
    value, window = _log(step.loss), state["losses"]
    if rises(window, value, LOSS) and step.loss > (state["first"] or 0) / 2:
        before = math.exp(statistics.median(window))
        yield (
            "loss",
            f"The loss rose to {step.loss:.3g} at step {step.number}, from about {before:.3g}. A smaller optimizer.lr or train.clip may help.",
        )
    _keep(window, value)
    if len(window) == LEAST and state["first"] is None:
        state["first"] = math.exp(statistics.median(window))


def _norm(state: dict[str, Any], step: Step) -> Iterator[tuple[str, str]]:
    norm, window = step.metrics.get("grad_norm", 0.0), state["norms"]
    if not math.isfinite(norm):
        yield (
            "norm",
            f"The gradient's norm is {norm} at step {step.number}. A smaller optimizer.lr, or train.precision=fp32, may help.",
        )
    elif norm:
        value = _log(norm)
        if rises(window, value, NORM):
            before = math.exp(statistics.median(window))
            yield (
                "norm",
                f"The gradient's norm rose to {norm:.3g} at step {step.number}, from about {before:.3g}. A smaller optimizer.lr may help.",
            )
        _keep(window, value)


def _dead(state: dict[str, Any], step: Step) -> Iterator[tuple[str, str]]:
    state["dead"] = state["dead"] + 1 if step.metrics.get("grad_norm") == 0 else 0
    if state["dead"] == DEAD:
        yield (
            "dead",
            f"The gradient is 0 in the {DEAD} steps up to {step.number}: nothing is learned. The settings may leave nothing to train.",
        )


def _motion(state: dict[str, Any], session: Session, step: Step) -> Iterator[tuple[str, str]]:
    """Which parts stand still since the phase's first step; looked at until all have moved, for a few steps."""
    if state["seen"] == 1:
        state["still"] = marks(units(session.states))
    elif state["still"] and state["seen"] <= FEW:
        state["still"] = _unmoved(state["still"], session)
    if state["still"] and state["seen"] == FEW and not _may_rest(session):
        yield "still", f"{_stands(state['still'], session)} in the first {FEW} steps."


def _may_rest(session: Session) -> bool:
    """Whether some parts may rest, and perhaps for good."""
    return session.current.unused_parameters or session.selector.unused_parameters


def _unmoved(still: dict[str, int], session: Session) -> dict[str, int]:
    now = {name: t for name, t in units(session.states).items() if name in still}
    return {name: mark for name, mark in marks(now).items() if mark == still[name]}


def _stands(still: dict[str, int], session: Session) -> str:
    found, name = units(session.states), next(iter(still))
    reached = any(p is found[name] for p in session.optimizer.state) or name.startswith("entries")
    why = "" if reached else ", which got no gradient"
    return f"{len(still)} of {len(found)} trained parts did not move (first: {name}{why})"


@torch.no_grad()
def units(states: nn.Module) -> dict[str, Tensor]:
    """Return what should move, by name: every trained tensor, but a store of entries layer by layer."""
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
def marks(tensors: dict[str, Tensor]) -> dict[str, int]:
    """A number for each tensor that changes with any of its bits: their sum as integers."""
    sums = [t.detach().contiguous().view(BITS[t.element_size()]).sum() for t in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))


class Frozen:
    """What a run must leave as it was, marked before its first step: parameters that nothing trains, and buffers.

    ``changed`` compares in the same process. Where every part can be switched off with no file read, the whole base is compared with what was loaded.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.states = setup, setup.session.states
        self.buffers, self.rest = self._buffers(), "" if self._recoverable else self._parameters()

    @property
    def _recoverable(self) -> bool:
        return all(part.recoverable for part in parts(self.setup.session.states))

    def _own(self) -> set[str]:
        """The model's names of what the parts brought or train."""
        return {
            n.replace("/", ".")
            for part in parts(self.setup.session.states)
            for n, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        }

    def _parameters(self) -> str:
        return fingerprint(self.setup.session.model, self._own())

    def _buffers(self) -> dict[str, int]:
        """A mark of each of the model's own buffers; statistics of batches are such."""
        own = self._own()
        buffers = {
            name.replace(".base.", "."): buffer for name, buffer in self.setup.session.model.named_buffers()
        }
        return marks(
            {
                name: buffer
                for name, buffer in buffers.items()
                if name not in own and buffer.element_size() in BITS
            }
        )

    def changed(self) -> list[str]:
        """What did not stay as it was, in words."""
        session, found = self.setup.session, list[str]()
        now = self._buffers()
        if moved := [name for name, mark in self.buffers.items() if now.get(name) != mark]:
            found.append(
                f"{len(moved)} buffers of the model changed in training (first: {moved[0]}), and the stored change does not hold them"
            )
        if self._recoverable:
            with base(session.states):
                same = fingerprint(session.model, self.setup.base.head) == self.setup.fingerprint
        else:
            same = self.states is not session.states or self._parameters() == self.rest
        return (
            found
            if same
            else [
                *found,
                "frozen weights changed while it was trained: without its parts the model is not the pretrained one",
            ]
        )


def suspicions(
    state: dict[str, Any],
    setup: Setup,
    frozen: Frozen,
    delta: Path | None = None,
    best_step: int | None = None,
) -> list[str]:
    """Why the run, as it stands after its last step, should not be trusted; empty when all is well.

    ``delta``: the folder of its stored change, that of ``best_step``.
    """
    session, found = setup.session, list[str]()
    still = _unmoved(state["still"] or {}, session) if state["seen"] > 1 else {}
    if still and not (_may_rest(session) and len(still) < len(units(session.states))):
        found.append(_stands(still, session))
    return [*found, *frozen.changed(), *differences(session, delta, best_step)]
