"""Whether as many entries are trained as the method's ``sparsity`` asks, where it says so exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..core.kernel import Kernel, Kernelized
from ..core.part import patched
from ..core.sparse.bank import SparseDelta
from ..core.sparse.engine import Sparse
from ..core.sparse.grain import grain_of
from .session import Session


def sparsity(session: Session, delta: Path | None = None, step: int | None = None) -> list[str]:
    """In words, where the session's layers differ from what was asked; empty where they agree, or where nothing exact is asked.

    ``delta``: the folder of the change that was stored after ``step`` of the run, to be held against the same.
    """
    method: Any = session.current
    if isinstance(method, Sparse) and getattr(method, "threshold", None) is None:
        return [
            *_trained(session, method),
            *(_stored(session, method, delta, step) if delta and step else []),
        ]
    if (
        isinstance(method, Kernelized)
        and method.sparsity
        and session.current.ready(session.run.step, session.run.total)
    ):
        return list(_kernels(session, method.sparsity))
    return []


def _views(session: Session) -> list[SparseDelta]:
    return [m for m in session.states["method"].modules() if isinstance(m, SparseDelta)]


def _asked(session: Session, method: Sparse, done: int) -> tuple[float, int]:
    """The count of the layers' entries minus the share ``sparsity`` of it, times what the schedule says of the phase's step ``done`` (from 0).

    Also by how much rounding may move it: one unit a layer.
    """
    views, total = _views(session), session.run.total
    share = method.schedule.first(total)
    for step in () if _narrows_by_value(method) else range(1, done + 1):
        if (move := method.schedule.move(step, total)) is not None:
            share = move.density
    unit = max(grain_of(method.grain, view.site, session.model).size for view in views)
    return (1 - method.sparsity) * share * sum(view.site.size for view in views), unit * len(views)


def _narrows_by_value(method: Sparse) -> bool:
    """Whether how many entries go on is for their values to say."""
    return method.narrows_by_value and method.schedule.name == "narrow"


def _trained(session: Session, method: Sparse) -> Iterator[str]:
    asked, slack = _asked(session, method, session.run.step)
    found = sum(len(view.bank.where(view.i)) for view in _views(session))
    if found - asked > slack or (asked - found > slack and not _narrows_by_value(method)):
        yield f"{found} entries are trained and {asked:.0f} were asked for by method.sparsity={method.sparsity:g}"


def _stored(session: Session, method: Sparse, delta: Path, step: int) -> Iterator[str]:
    """Entries that are trained no more may have kept their change, so that there are more."""
    start = session.phases[session.phase][1]
    if step <= start or method.schedule.name == "narrow":
        return
    asked, slack = _asked(session, method, step - start - 1)
    with safe_open(delta / "delta.safetensors", "pt") as file:
        names = file.keys()  # safetensors' handle is no mapping
        found = sum(file.get_slice(name).get_shape()[0] for name in names if name == "method.bank.values")
    if asked - found > slack or (found - asked > slack and method.schedule.dropped == "base"):
        yield f"{found} entries are stored and {asked:.0f} were asked for by method.sparsity={method.sparsity:g}"


@torch.no_grad()
def _kernels(session: Session, asked: float) -> Iterator[str]:
    """Entries of the kernels' changes that are 0; equal ones at the threshold may be 0 together."""
    size = zeros = count = 0
    for layer in patched(session.model).values():
        for delta in layer.deltas:
            if isinstance(delta, Kernel):
                change = delta(layer.original)
                size, zeros, count = size + change.numel(), zeros + int((change == 0).sum()), count + 1
    if size and not -count <= zeros - asked * size <= count + 0.01 * size:
        yield f"{zeros} entries of the change are 0 and {asked * size:.0f} were asked for by method.sparsity={asked:g}"
