"""Plan a run without training it: what it would train and store, and the memory that it would need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config.settings import Config
from ..core.attach import parts, patched, trained_in_place
from ..core.state import entry_stores
from ..storage.delta import stored_bytes
from .batch_size import resident_bytes
from .build import method_states
from .phases import attached_phases
from .prepare import count_parameters, prepare
from .session import Session

STATE_TENSORS = 3  # of each trained entry: its gradient and the optimizer's two moments


def plan(config: Config) -> dict[str, Any]:
    """Return what ``train`` would do; trains and writes nothing.

    Trained entries by layer and stored bytes are those at the start of the last phase; the expected peak
    memory is the maximum over all phases. A layer's count is ``None`` if earlier phases would decide it.
    """
    setup = prepare(config)
    session = setup.session
    session.start()
    peaks = [_expected_peak(session, count_parameters(setup)["trained"])]
    for phase in range(1, len(session.phases)):
        previous = session.states["method"]
        session.enter(phase)
        session.start(previous)
        peaks.append(_expected_peak(session, count_parameters(setup)["trained"]))
    notes = list(setup.notes)
    if session.phase > 0:
        notes.append("The phases before the last decide how many entries each layer gets.")
    streams = {name: dataset.name for name, dataset in config.streams.items()}
    return {
        "method": config.method.name,
        "objective": config.objective.name,
        "model": setup.base.source,
        "dataset": config.dataset.name,
        **({"streams": streams} if streams else {}),
        "task": setup.base.task,
        "steps": config.train.steps,
        "layers": _layers(session),
        "params": count_parameters(setup),
        "changed_at_most": _bound_changed(session),
        "stored_bytes": stored_bytes(session.states),
        "expected_peak_memory_bytes": max(peaks),
        "notes": notes,
    }


def _layers(session: Session) -> list[dict[str, Any]]:
    """Return name, shape and trained entries of each layer that the method changes."""
    layers = []
    for name, layer in patched(session.model).items():
        trained = None
        if session.phase == 0:
            trained = 0
            for delta in layer.deltas:
                trained += sum(tensor.numel() for tensor in delta.inputs())
        layers.append({"layer": name, "shape": list(layer.original.shape), "trained": trained})
    for name, parameter in trained_in_place(session.states).items():
        layers.append({"layer": name, "shape": list(parameter.shape), "trained": parameter.numel()})
    return layers


def _bound_changed(session: Session) -> float | None:
    """Return the largest share of the adapted entries that can differ from the pretrained ones at the end.

    Where entries that are not trained any more may keep their change, that is all. None if nothing is
    adapted.
    """
    attached = method_states(session.states)
    changes_stay = False
    planned = attached_phases(session.phases, session.phase)
    for phase, state in zip(planned, attached, strict=True):
        if phase.method.stored_shapes(state, phase.end - phase.start) is None:
            changes_stay = True
    most = adapted = sum(part.adapted() for part in parts(session.states))
    of_entries = 0  # sizes of the layers in which only single entries change
    for layer in patched(session.model).values():
        size = layer.live
        adapted += size
        if changes_stay or any(delta.changes().entries is None for delta in layer.deltas):
            most += size
        else:
            of_entries += size
    capacity = sum(len(store.values) for store in entry_stores(session.states))
    most += min(of_entries, capacity)
    return most / adapted if adapted else None


def _expected_peak(session: Session, trained: int) -> int:
    """Estimate the peak memory in bytes.

    It is the memory of this process as it stands, plus what one micro-batch keeps for backward, plus gradient
    and two moments of each of the ``trained`` entries. Training without gradients keeps nothing of this.
    """
    needs_grad = session.recipe.optimizer.needs_grad
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = next(batch for batch in next(session.batches.steps(0, 1)) if batch)
    weights = {p.untyped_storage().data_ptr() for p in session.tuned.parameters()}
    noting = torch.autograd.graph.saved_tensors_hooks(note, _unchanged)
    with torch.set_grad_enabled(needs_grad), noting, session.accelerator.autocast():
        seen = session.tuned(session.recipe.objective.needs, **session.compute.on_device(batch.inputs))
    activations = sum(size for place, size in kept.items() if place not in weights)
    del seen
    on_gpu = session.accelerator.device.type == "cuda"
    now = torch.cuda.memory_allocated() if on_gpu else resident_bytes()
    if not needs_grad:
        return now
    return now + activations + STATE_TENSORS * torch.float32.itemsize * trained


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
