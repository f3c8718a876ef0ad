"""Open a run as a further model of a pass, without the base's weights.

The run is built on the meta device, where weights have no values. Its stored change is in memory, and what it
adds to a layer is computed when the weight of that layer is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.load import load as load_config
from ..config.settings import Config, ModelConfig
from ..core.attach import parts, patched
from ..core.layer import Patched
from ..core.roles import in_head
from ..core.site import Site
from ..core.zeros import fingerprint_zeros
from ..errors import ConfigError
from ..models.folder import refuse_foreign_code
from ..models.masks import hold_stored_zeros
from ..models.scratch import describe
from ..models.stored import name_parameters
from ..storage.delta import load_delta, read_description
from ..storage.frozen_config import MOVABLE
from ..storage.tensor_file import TensorFile
from ..training.build import Pretrained, build_states
from .model_files import StoredModel, fingerprint_files
from .parent import Parent, name_runs
from .reopen import run_of


def open_run(path: Path, base: StoredModel, sites: Sequence[Site]) -> Parent:
    """Open a finished run whose method changes weights of linear layers, each by values of its own."""
    try:
        files, state = run_of(path)
        config = load_config([], None, files.config)
        about = read_description(files.delta)
        files.check_unaltered(about["config"], files.delta, MOVABLE)
    except ConfigError as error:
        raise ConfigError(*name_runs(error, path)) from None
    merge = f"Write its model with `finetune merge ckpt={path} out=FOLDER`, and name that folder."
    if state:
        raise ConfigError(f"runs={path} is a checkpoint, and only a run has a stored change. {merge}")
    stored = _open_delta(files.delta / "delta.safetensors")
    model = _build_on_meta(path, about, base, stored)
    _check_base(path, config, about, model, base)
    if "zeros" in about:
        _hold_zeros(path, about["zeros"], model, base)
    states = _attach(model, tuple(about["head"]), config)
    method = config.method.name
    if states is None:
        refusal = f"runs={path}: the change of method={method} cannot be read layer by layer."
        raise ConfigError(f"{refusal} {merge}")
    layers = patched(model)
    _check_covered(path, list(layers), sites)
    load_delta(files.delta, states)
    head: dict[str, Tensor] = {}
    is_that_of_base = True
    for name in about["head"]:
        head[name] = model.get_parameter(name).detach()
        is_that_of_base = is_that_of_base and base.has(name, head[name])
    described = {"kind": "run", "method": method, "step": about["step"]}
    described["fingerprint"] = fingerprint_files([stored])

    def change(site: Site, weight: Tensor) -> Tensor | None:
        layer = layers.get(site.name)
        return None if layer is None else _change_of(layer, weight, getattr(torch, config.model.dtype))

    return Parent(path, described, change, {} if is_that_of_base else head, tuple(about["labels"]))


def _attach(model: Any, head: tuple[str, ...], config: Config) -> nn.Module | None:
    """Return the states of a run's method on a model without values, which hold all that the run stores.

    None if the method needs values of the weights, has several phases, or changes anything but the weights of
    linear layers and the head.
    """
    if len(config.method.phases()) > 1:
        return None
    pretrained = Pretrained(model, head, new_head=False, train_head=config.method.head)
    try:
        states = build_states(pretrained, config.method, config.selector)
    except (RuntimeError, NotImplementedError, ValueError):  # the method reads weights
        return None
    on_layers: set[nn.Module] = set()
    for layer in patched(model).values():
        on_layers.update(layer.deltas)
    for part in parts(states["method"]):
        if part not in on_layers or not part.mergeable:
            return None
    for tensor in states.state_dict().values():
        if tensor.is_meta:
            return None
    return states if on_layers else None


@torch.no_grad()
def _change_of(layer: Patched, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the deltas of a layer on the meta device add to its base's ``weight``, [out, in]."""
    absent = layer.base.weight
    stored = weight.to(dtype)
    layer.base.weight = nn.Parameter(stored.T if layer.transposed else stored, requires_grad=False)
    try:
        return layer.sum_changes()[1]
    finally:
        layer.base.weight = absent


def _open_delta(file: Path) -> TensorFile:
    try:
        return TensorFile(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is missing, damaged or cut short ({error}). "
            "Copy it again from where it was made, or train again."
        ) from None


def _build_on_meta(path: Path, about: Mapping[str, Any], base: StoredModel, stored: TensorFile) -> Any:
    """Return the model of a run without the values of its weights; those of its head are not set yet."""
    named = ModelConfig("hf", str(base.folder))
    if about["task"] not in refuse_foreign_code(base.folder, named):
        raise ConfigError(
            f"runs={path} was trained for {about['task']}, which model={base.folder} cannot do."
        )
    model = describe(base.folder, named, about["task"], tuple(about["labels"]))
    if type(model) is not type(base.model):
        raise ConfigError(
            f"runs={path} is a {type(model).__name__}, and model={base.folder} is stored as a "
            f"{type(base.model).__name__}, which has no place for its head. Merge each run with `finetune "
            "merge`, and fold the folders, with one of them as model=FOLDER."
        )
    shapes, entries = {}, 0
    for name, parameter in model.named_parameters():
        if name in about["head"] and in_head(model, name):
            shapes[name] = parameter.shape
            entries += parameter.numel()
    most = sum(prod(stored.describe(name)[1]) for name in stored.names)
    if set(about["head"]) != shapes.keys() or entries > most:
        raise ConfigError(
            f"runs={path}: its delta.json names a head that its change does not hold. Copy the run again "
            "from where it was made."
        )
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        values = torch.zeros(shape)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    return model


def _check_base(path: Path, config: Config, about: Mapping[str, Any], model: Any, base: StoredModel) -> None:
    """Raise ``ConfigError`` unless a run was trained on the weights of the base's folder.

    A head that the run kept belongs to its base, and a new one does not.
    """
    names = tuple(name for name, _ in name_parameters(model))
    body = tuple(name for name in names if name not in about["head"])
    dtype = getattr(torch, config.model.dtype)
    if about["base_fingerprint"] not in (base.fingerprint(body, dtype), base.fingerprint(names, dtype)):
        raise ConfigError(
            f"runs={path} was trained on another base than model={base.folder}: the weights differ. Name the "
            f"model of the run, {config.model.path}, or leave the run out."
        )


def _hold_zeros(path: Path, mark: str, model: Any, base: StoredModel) -> None:
    """Hold the entries at 0 that were held when the run was trained."""
    hold_stored_zeros(base.folder, ModelConfig("hf", str(base.folder)), model)
    if fingerprint_zeros(model) != mark:
        raise ConfigError(
            f"runs={path} was trained with other masks of pruned entries than those of model={base.folder}. "
            "Restore the original base."
        )


def _check_covered(path: Path, changed: Sequence[str], sites: Sequence[Site]) -> None:
    """Raise ``ConfigError`` if a run changes a layer that the pass does not work on."""
    left = list(changed)
    for site in sites:
        if site.name in left:
            left.remove(site.name)
    if left:
        raise ConfigError(
            f"runs={path} changes {len(left)} layers that targets leaves out (first: {left[0]}). Their "
            "change would be lost. Add them to targets."
        )
