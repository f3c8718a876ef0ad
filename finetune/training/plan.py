"""What a run would do, without doing it."""

from __future__ import annotations

from typing import Any

import torch

from ..config.settings import Config
from ..core.part import patched, trained_in_place
from ..storage import delta as stored
from .memory import resident
from .prepare import params, prepare
from .session import Session


def plan(config: Config) -> dict[str, Any]:
    """What ``train`` would do: trained entries per layer and stored bytes, as the last phase begins, and the expected peak memory of all phases.

    Trains and writes nothing.
    """
    setup = prepare(config)
    session = setup.session
    session.start()
    peaks = [_expected_peak(session, params(setup)["trained"])]
    for phase in range(1, len(session.phases)):
        previous = session.states["method"]
        session.enter(phase)
        session.start(previous)
        peaks.append(_expected_peak(session, params(setup)["trained"]))
    open_yet = session.phase > 0  # what nothing has moved yet says nothing of where the entries will be
    layers = [
        {
            "layer": name,
            "shape": list(m.original.shape),
            "trained": None if open_yet else sum(t.numel() for d in m.deltas for t in d.inputs()),
        }
        for name, m in patched(session.model).items()
    ]
    for name, parameter in trained_in_place(session.states).items():
        layers.append({"layer": name, "shape": list(parameter.shape), "trained": parameter.numel()})
    notes = ["The phases before the last decide how many entries each layer gets."] if open_yet else []
    return {
        "method": config.method.name, "model": setup.base.source, "dataset": config.dataset.name, "task": setup.base.task, "steps":
        config.train.steps, "layers": layers, "params": params(setup), "stored_bytes": stored.stored_bytes(session.states),
        "expected_peak_memory_bytes": max(peaks), "notes": setup.notes + notes,
    }  # fmt: skip


def _expected_peak(session: Session, trained: int) -> int:
    """This process as it stands, plus what one micro-batch keeps for backward, plus gradient and two moments of each trained entry."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    batch = next(b for b in next(session.batches.steps(0, 1)) if b)
    weights = {p.untyped_storage().data_ptr() for p in session.tuned.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), session.accelerator.autocast():
        logits = session.tuned(**session.on_device(batch.inputs))
    activations = sum(size for place, size in kept.items() if place not in weights)
    del logits
    now = torch.cuda.memory_allocated() if session.accelerator.device.type == "cuda" else resident()
    return now + activations + 3 * 4 * trained
