"""How much a configuration trains and stores, counted on tensors without values. Imports torch.

Weights are read once for each model and task, and their shapes kept; what a method adds is built on the meta device.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import plugins
from ..config.settings import Config
from ..core.method import Method
from ..core.state import Shapes, stored_shapes
from ..errors import ConfigError
from ..models.load import load as load_model
from ..storage import manifest
from ..storage.atomic import to_json_value
from ..storage.run_folder import run_folder
from ..training.build import Pretrained, build_states

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
          torch.uint8: "U8", torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16"}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """``trained`` entries and ``stored`` bytes, as a run of it reports them. The new head is in both, ``head`` entries of it."""

    trained: int
    stored: int
    head: int


@dataclass(frozen=True)
class Frame:
    """A model without values, all of it frozen; the parameters of its new head, the task, its labels, and all ``total`` parameters."""

    model: nn.Module
    head: tuple[str, ...]
    task: str
    labels: tuple[str, ...]
    total: int


_frames: dict[str, Frame] = {}


def frame(config: Config) -> Frame:
    """The model of ``config`` for its data set; read once a process."""
    tree = config.as_dict()
    key = json.dumps([tree["model"], tree["dataset"]], sort_keys=True)
    if key not in _frames:
        raw = config.dataset.read()
        base = load_model(config.model, raw.task, raw.labels, config.seed)
        total = sum(p.numel() for p in base.model.parameters())
        _frames[key] = Frame(_emptied(base.model), base.head, raw.task, raw.labels, total)
    return _frames[key]


def _emptied(model: nn.Module) -> nn.Module:
    """``model`` with its parameters on the meta device; those that are shared stay so."""
    held = list(model.parameters())
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in held}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = empty[id(parameter)]
    return model


def measure(config: Config, method: Method | None = None) -> Size:
    """The size of ``config``, with ``method`` instead of its own if given. Raises ``ConfigError`` where the method does not fit the model.

    What is trained is that of the last phase. Where entries are chosen by data, their positions are taken to lie at random: the bytes of the gaps
    between them are the expected ones, and 0 for ``stored`` says that nothing can be expected.
    """
    method = method or config.method
    last, at = method.phases()[-1].method, frame(config)
    seed = config.seed + len(method.phases()) - 1
    try:
        states, shapes = _counted(at, last, seed, config.train.steps, "meta")
    except (NotImplementedError, RuntimeError):  # it needs numbers, of its own at least
        states, shapes = _counted(at, last, seed, config.train.steps, "cpu")
    head = sum(p.numel() for p in states["head"].parameters()) if "head" in states else 0
    trained = sum(p.numel() for p in states.parameters() if p.requires_grad)
    return Size(trained, 0 if shapes is None else _file(shapes) + _about(config, method, at), head)


def _counted(
    at: Frame, method: Method, seed: int, steps: int, device: str
) -> tuple[nn.ModuleDict, Shapes | None]:
    """The states as a session builds them, on a copy of the model, and what is stored of them."""
    pretrained = Pretrained(copy.deepcopy(at.model), at.head)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        states = build_states(pretrained, method)
        return states, _stored(states, method, steps)


def _stored(states: nn.ModuleDict, method: Method, steps: int) -> Shapes | None:
    """Return dtype and shape of every stored tensor, by name; None if training decides."""
    found: Shapes = {}
    for name, state in states.items():
        shapes = method.stored_shapes(state, steps) if name == "method" else stored_shapes(state)
        if shapes is None:
            return None
        for inner, shape in shapes.items():
            found[f"{name}.{inner}"] = shape
    return found


def _file(shapes: Shapes) -> int:
    """Bytes of a safetensors file of these tensors: the header's length, the header in whole words of 8 bytes, the data."""
    header, end = dict[str, Any](), 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":")).encode()) // 8) * 8 + end


def _about(config: Config, method: Method, at: Frame) -> int:
    """Bytes of ``delta.json``, but for a digit or two."""
    named = replace(config, method=method, name=config.name or "sweep-01234567")
    named = replace(named, run=run_folder(named).name)
    content = {
        **manifest.HEADER, "method": method.name, "config": named.as_dict(), "task": at.task, "labels": list(at.labels), "head": list(at.head),
        "step": config.train.steps, "phase": len(method.phases()) - 1, "base_fingerprint": "0" * 64,
        **plugins.record_of(config),
    }  # fmt: skip
    return len(json.dumps(to_json_value(content), indent=2, ensure_ascii=False).encode()) + 1


def check(config: Config, method: Method) -> None:
    """Raise ``ConfigError`` for what ``method`` says cannot mean anything in this run."""
    if faults := method.faults(config.train.steps):
        raise ConfigError(*faults)
