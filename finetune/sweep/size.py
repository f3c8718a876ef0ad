"""Count how much a configuration trains and stores, on tensors without values. Imports torch.

Weights are read once for each model and task, and only their shapes are kept. What a method adds is built on
the meta device.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import plugin_records
from ..config.settings import Config
from ..core.attach import parts
from ..core.method import Method
from ..core.state import Shapes, stored_shapes
from ..core.zeros import describe_zeros
from ..errors import ConfigError
from ..models.load import load as load_model
from ..storage import manifest
from ..storage.atomic import to_json_value
from ..storage.run_folder import run_folder
from ..training.build import Pretrained, build_states, method_states
from ..training.phases import PlannedPhase, attached_phases, plan_phases

DTYPES = {  # names of types in a safetensors header
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.int16: "I16",
}


@dataclass(frozen=True)
class Size:
    """``trained`` entries and ``stored`` bytes as a run reports them; both include the head.

    ``head`` is the number of its trained entries.
    """

    trained: int
    stored: int
    head: int


@dataclass(frozen=True)
class Frame:
    """A frozen model on the meta device, with the data set's task and labels.

    ``head`` names the parameters of its head, ``new_head`` says whether they are new, and ``total`` counts
    all of the model's parameters.
    """

    model: nn.Module
    head: tuple[str, ...]
    new_head: bool
    task: str
    labels: tuple[str, ...]
    total: int


_frames: dict[str, Frame] = {}


def frame(config: Config) -> Frame:
    """Return the model of ``config`` for its data set; it is read once per process."""
    tree = config.as_dict()
    key = json.dumps([tree["model"], tree["dataset"]], sort_keys=True)
    if key not in _frames:
        raw = config.dataset.read()
        base = load_model(config.model, raw.task, raw.labels, config.seed)
        total = sum(p.numel() for p in base.model.parameters())
        _move_to_meta(base.model)
        _frames[key] = Frame(base.model, base.head, base.new_head, raw.task, raw.labels, total)
    return _frames[key]


def _move_to_meta(model: nn.Module) -> None:
    """Replace the parameters of ``model`` by frozen ones on the meta device; shared ones stay shared."""
    old = list(model.parameters())  # keeps them alive: a freed parameter could give its id to another one
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in old}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = empty[id(parameter)]


def measure(config: Config, method: Method | None = None) -> Size:
    """Return the size of ``config``, with ``method`` instead of its own if given.

    Trained entries are those of the last phase and of the phases below it that are kept. Where data chooses
    entries, their positions are taken to lie at random, so the bytes of the gaps between them are expected
    ones. ``stored`` is 0 where training decides what is stored. Raises ``ConfigError`` if the method does not
    fit the model.
    """
    method = method or config.method
    model = frame(config)
    try:
        states, shapes = _build(config, method, model, "meta")
    except (NotImplementedError, RuntimeError):  # the method computes with values while it is built
        states, shapes = _build(config, method, model, "cpu")
    head = 0
    if "head" in states:
        head = sum(p.numel() for p in states["head"].parameters() if p.requires_grad)
    trained = sum(p.numel() for p in states.parameters() if p.requires_grad)
    if "kept" in states:
        trained += sum(p.numel() for p in states["kept"].parameters())
    trained -= sum(part.count_held() for part in parts(states))
    stored = 0
    if shapes is not None:
        stored = _tensor_file_bytes(shapes) + _description_bytes(config, method, model)
    return Size(trained, stored, head)


def _build(config: Config, method: Method, frame: Frame, device: str) -> tuple[nn.ModuleDict, Shapes | None]:
    """Build the states of the last phase as a session does, on a copy of the model.

    Returns them and what is stored of them.
    """
    pretrained = Pretrained(
        copy.deepcopy(frame.model), frame.head, new_head=frame.new_head, train_head=method.head
    )
    phases = plan_phases(method, config.train.steps, config.objective)
    attached, states = attached_phases(phases, len(phases) - 1), None
    with torch.random.fork_rng(devices=[]), torch.device(device):
        for number, phase in enumerate(attached, len(phases) - len(attached)):
            torch.manual_seed(config.seed + number)
            states = build_states(pretrained, phase.method, previous=states)
        assert states is not None
        return states, _stored(states, attached)


def _stored(states: nn.ModuleDict, attached: list[PlannedPhase]) -> Shapes | None:
    """Return dtype and shape of every stored tensor, by name; ``None`` if training decides.

    ``attached``: the phases of the states.
    """
    found: Shapes = {}
    shapes: dict[str, Shapes | None] = {}
    names = [*(f"kept.{i}" for i in range(len(attached) - 1)), "method"]
    for name, state, phase in zip(names, method_states(states), attached, strict=True):
        shapes[name] = phase.method.stored_shapes(state, phase.end - phase.start)
    for name in states.keys() - {"kept", "method"}:
        shapes[name] = stored_shapes(states[name])
    for name, inner in shapes.items():
        if inner is None:
            return None
        for key, shape in inner.items():
            found[f"{name}.{key}"] = shape
    return found


def _tensor_file_bytes(shapes: Shapes) -> int:
    """Return the bytes of a safetensors file of these tensors.

    It holds the header's length, the header filled up to whole words of 8 bytes, and the data.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in sorted(shapes.items(), key=_place_in_file):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + math.ceil(length / 8) * 8 + end


def _place_in_file(item: tuple[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[int, str]:
    """Sort tensors as safetensors does: wide types first, then by name."""
    name, (dtype, _) = item
    return -dtype.itemsize, name


def _description_bytes(config: Config, method: Method, frame: Frame) -> int:
    """Return the bytes of ``delta.json``, to within a digit or two."""
    named = replace(config, method=method, name=config.name or "sweep-01234567")
    named = replace(named, run=run_folder(named).name)
    content = {
        **manifest.HEADER,
        "method": method.name,
        "config": named.as_dict(),
        "task": frame.task,
        "labels": list(frame.labels),
        "head": list(frame.head),
        "step": config.train.steps,
        "phase": len(method.phases()) - 1,
        "base_fingerprint": "0" * 64,
        **describe_zeros(frame.model),
        **plugin_records.record_of(config),
    }
    return len(json.dumps(to_json_value(content), indent=2, ensure_ascii=False).encode()) + 1


def check(config: Config, method: Method) -> None:
    """Raise ``ConfigError`` with the faults that ``method`` finds in its settings for this run."""
    if faults := method.faults(config.train.steps):
        raise ConfigError(*faults)
