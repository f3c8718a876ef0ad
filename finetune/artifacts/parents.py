"""Open the further models of a pass, runs or model folders of one base, and read their changes by layer.

No model is loaded. A run is built on the meta device, where the base's weights have no values. Its stored
change is in memory, and what it adds to a layer is computed when the weight of that layer is read. A folder
is read tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ..models.folder import read_json, refuse_foreign_code
from ..models.head import HeadMismatch, read_label_names
from ..models.masks import OR_FREE, hold_stored_zeros
from ..models.scratch import describe
from ..models.stored import name_parameters
from ..storage.delta import load_delta, read_description
from ..storage.frozen_config import MOVABLE
from ..storage.tensor_file import TensorFile
from ..training.build import Pretrained, build_states
from .model_files import StoredModel, fingerprint_files, open_files
from .reopen import run_of

Change = Callable[[Site, Tensor], Tensor | None]


@dataclass(frozen=True)
class Parent:
    """A further model of a pass.

    ``about``: what is recorded of it; no path is. ``change``: returns what it adds to the weight of a site,
    [out, in], float64, given the base's weight; None for a layer that it does not change. ``head``: the
    values of its head by the model's names, if they are not those of the base. ``labels``: of that head.
    """

    path: Path
    about: dict[str, Any]
    change: Change
    head: Mapping[str, Tensor]
    labels: tuple[str, ...]


def open_parents(paths: Sequence[Path], base: StoredModel, sites: Sequence[Site]) -> list[Parent]:
    """Open the runs and folders at ``paths``. Raises ``ConfigError`` with the faults of all."""
    found: list[Parent] = []
    faults: list[str] = []
    for path in paths:
        try:
            open_one = _open_run if is_run(path) else _open_folder
            found.append(open_one(path, base, sites))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(*dict.fromkeys(faults))
    return found


def is_run(path: Path) -> bool:
    """Tell whether a folder is a run, or a part of one, and no model."""
    return not (path / "config.json").is_file()


def find_path_faults(paths: Sequence[Path]) -> list[str]:
    """Return a fault for each path that is neither a run nor a model folder."""
    faults: list[str] = []
    for path in paths:
        try:
            if is_run(path):
                run_of(path)
        except ConfigError as error:
            faults += [_named(fault, path) for fault in error.faults]
    return list(dict.fromkeys(faults))


def _named(fault: str, path: Path) -> str:
    named = fault.replace(f"ckpt={path}", f"runs={path}").replace(f"model.path={path}", f"runs={path}")
    return named.replace(OR_FREE, "")


def _open_run(path: Path, base: StoredModel, sites: Sequence[Site]) -> Parent:
    """Open a finished run whose method changes weights of linear layers, each by values of its own."""
    try:
        files, state = run_of(path)
        config = load_config([], None, files.config)
        about = read_description(files.delta)
        files.check_unaltered(about["config"], files.delta, MOVABLE)
    except ConfigError as error:
        raise ConfigError(*(_named(fault, path) for fault in error.faults)) from None
    merge = f"Write its model with `finetune merge ckpt={path} out=FOLDER`, and name that folder."
    if state:
        raise ConfigError(
            f"runs={path} is a checkpoint, and only a finished run has a stored change. {merge}"
        )
    stored = _open_delta(files.delta / "delta.safetensors")
    model = _build_on_meta(path, about, base, stored)
    _check_base(path, config, about, model, base)
    if "zeros" in about:
        _hold_zeros(path, about["zeros"], model, base)
    method = config.method.name
    refusal = f"runs={path}: the change of method={method} cannot be read layer by layer. {merge}"
    if len(config.method.phases()) > 1:
        raise ConfigError(refusal)
    pretrained = Pretrained(model, tuple(about["head"]), new_head=False, train_head=config.method.head)
    try:
        states = build_states(pretrained, config.method, config.selector)
    except (RuntimeError, NotImplementedError, ValueError):  # the method reads weights, which have no values
        raise ConfigError(refusal) from None
    layers = patched(model)
    on_layers = [delta for layer in layers.values() for delta in layer.deltas]
    for part in parts(states["method"]):
        if part not in on_layers or not part.mergeable:
            raise ConfigError(refusal)
    if not layers or any(tensor.is_meta for tensor in states.state_dict().values()):
        raise ConfigError(refusal)
    _check_covered(path, list(layers), sites)
    load_delta(files.delta, states)
    head: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in about["head"]:
            head[name] = parameter.detach()
    if all(base.has(name, tensor) for name, tensor in head.items()):
        head = {}
    described = {"kind": "run", "method": method, "step": about["step"]}
    described["fingerprint"] = fingerprint_files([stored])

    def change(site: Site, weight: Tensor) -> Tensor | None:
        layer = layers.get(site.name)
        return None if layer is None else _change_of(layer, weight, getattr(torch, config.model.dtype))

    return Parent(path, described, change, head, tuple(about["labels"]))


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
    shapes = {name: p.shape for name, p in model.named_parameters() if in_head(model, name)}
    most = sum(prod(stored.describe(name)[1]) for name in stored.names)
    if not set(about["head"]) <= shapes.keys() or sum(shapes[name].numel() for name in about["head"]) > most:
        raise ConfigError(
            f"runs={path}: its delta.json names a head that its change does not hold. Copy the run again "
            "from where it was made."
        )
    for name in about["head"]:
        owner, _, leaf = name.rpartition(".")
        values = torch.zeros(shapes[name])
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
    known = {site.name for site in sites}
    left = [name for name in changed if name not in known]
    if left:
        raise ConfigError(
            f"runs={path} changes {len(left)} layers that targets leaves out (first: {left[0]}). Their "
            "change would be lost. Add them to targets."
        )


def _open_folder(path: Path, base: StoredModel, sites: Sequence[Site]) -> Parent:
    """Open a model folder that differs from the base in the weights of ``sites`` and in its head alone."""
    try:
        folder, config, files = open_files(str(path))
        model = describe(folder, config)
    except ConfigError as error:
        raise ConfigError(*(_named(fault, path) for fault in error.faults)) from None
    other = StoredModel(folder, files, model)
    if type(model) is not type(base.model) or other.stored.keys() != base.stored.keys():
        raise ConfigError(
            f"runs={path} is a {type(model).__name__} whose tensors are not those of model={base.folder}, a "
            f"{type(base.model).__name__}. Name models of one base."
        )
    head: dict[str, Tensor] = {}
    weights = {f"{site.name}.weight" for site in sites}
    for name in base.stored:
        if name in weights:
            _check_alike(path, name, base, other)
            continue
        its = other.read(name)
        if base.has(name, its):
            continue
        if not in_head(model, name):
            raise ConfigError(
                f"runs={path} differs from model={base.folder} in {name}, which is no weight of a layer in "
                "targets, so a part of its change would be lost. Add the layer to targets, or leave the "
                "model out."
            )
        head[name] = its
    labels: list[str] = []
    if head:
        try:
            labels = read_label_names(read_json(folder / "config.json", config))
        except HeadMismatch as error:
            raise ConfigError(
                f"runs={path} has a head of its own, but {error}. Correct config.json."
            ) from None

    def change(site: Site, weight: Tensor) -> Tensor | None:
        return site.as_matrix(other.read(f"{site.name}.weight")).double() - weight.double()

    about = {"kind": "model", "fingerprint": fingerprint_files(files)}
    return Parent(path, about, change, head, tuple(labels))


def _check_alike(path: Path, name: str, base: StoredModel, other: StoredModel) -> None:
    """Raise ``ConfigError`` unless a weight has the shape of the base's, and numbers that can be added."""
    described = []
    for folder in (base, other):
        stored = folder.stored[name]
        described.append(folder.file_of[stored].describe(stored))
    if described[0][1] != described[1][1] or described[1][0] not in ("F32", "F16", "BF16"):
        raise ConfigError(
            f"runs={path} stores {name} as {described[1][0]} of shape {list(described[1][1])}, and "
            f"model={base.folder} in the shape {list(described[0][1])}. Name models of one base in float32, "
            "float16 or bfloat16."
        )
