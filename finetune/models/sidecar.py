"""Read and write ``finetune/structure.json``: which layers of a model folder are stored as structures.

The file names, for each layer, a registered structure and its sizes, and never code or a path. It may come
from a stranger, so all of it is checked against the stored tensors and against the plain model on the meta
device before anything of its sizes is built.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from .. import registry
from ..config.settings import ModelConfig
from ..core.roles import in_head, is_matrix, is_transposed
from ..core.structure import Structure, StructuredLinear, structures_of
from ..errors import ConfigError, suggest_nearest
from ..storage import manifest
from ..storage.atomic import write_json_atomic
from ..system import safe
from .folder import list_weight_files
from .stored import match_names

FOLDER, NAME = "finetune", "structure.json"
FILE = f"{FOLDER}/{NAME}"
LAYER = re.compile(r"\w{1,100}(\.\w{1,100}){0,30}", re.ASCII)  # dotted names of modules
LARGEST = 2**31 - 1  # of a size
SHOWN = 20  # faults that one message names
FLOATS = ("F64", "F32", "F16", "BF16")
Structures = dict[str, Structure]


def read_structures(folder: Path, config: ModelConfig, has_weights: bool = True) -> Structures:
    """Return the structure of each layer by the layer's name in the checkpoint; none without the file.

    ``has_weights``: the stored tensors must be those of the structures. Raises ``ConfigError`` that names
    every fault.
    """
    named = f"model.path={config.path}: {FILE}"
    try:
        content = safe.read_json(folder / FILE)
        if newer := safe.explain_newer_format(Path(FILE), content):
            raise ConfigError(f"model.path={config.path}: {newer}.")
        if fault := safe.find_mismatch(content, {"structures": {str: {"structure": str}}}):
            raise safe.Unsafe(fault)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named} cannot be read ({error}). Copy the model's folder again.") from None
    found: Structures = {}
    faults: list[str] = []
    for layer, entry in content["structures"].items():
        try:
            _check_layer(layer, content["structures"])
            found[layer] = _read_structure(entry)
        except ValueError as error:
            faults.append(f"{named}: {layer[:80]!r}: {error}.")
    if has_weights and not faults:
        for reason in _compare_with_stored(found, _read_headers(folder, config)):
            faults.append(f"{named}: {reason}.")
    _raise(faults)
    return found


def _raise(faults: Sequence[str]) -> None:
    """Raise ``ConfigError`` if there are faults, with the first ones in full."""
    if len(faults) > SHOWN:
        faults = [*faults[:SHOWN], f"There are {len(faults) - SHOWN} more faults of this kind."]
    if faults:
        raise ConfigError(*faults)


def _check_layer(layer: str, layers: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the text is the name of a module, outside of all other layers."""
    if not LAYER.fullmatch(layer):
        raise ValueError("this is not the dotted name of a module")
    parent = layer.rpartition(".")[0]
    while parent:
        if parent in layers:
            raise ValueError(f"it lies inside {parent!r}, which is named as well")
        parent = parent.rpartition(".")[0]


def _read_structure(entry: Mapping[str, Any]) -> Structure:
    """Return the structure of one entry of the file; raises ``ValueError`` for what it cannot be."""
    name, known = entry["structure"], registry.catalog("structure")
    if name not in known:
        raise ValueError(
            f"structure={name[:40]!r} is not known.{suggest_nearest(name[:40], known)} "
            f"Known: {', '.join(known)}. Name its plug-in by --plugins DIR"
        )
    cls: Any = registry.get("structure", name)
    sizes = {key: value for key, value in entry.items() if key != "structure"}
    types = get_type_hints(cls)
    expected = [item.name for item in fields(cls)]
    if sizes.keys() != set(expected):
        raise ValueError(f"a {name} has the sizes {', '.join(expected)}, each once and no others")
    for key, value in sizes.items():
        if type(value) is not types[key]:
            raise ValueError(f"{key} should be a {types[key].__name__} and is {str(value)[:40]}")
        if types[key] is int and not 1 <= value <= LARGEST:
            raise ValueError(f"{key}={str(value)[:40]} is not a size from 1 to {LARGEST:,}")
    structure: Structure = cls(**sizes)
    if reasons := structure.faults():
        raise ValueError("; ".join(reasons))
    return structure


def _read_headers(folder: Path, config: ModelConfig) -> safe.Header:
    """Return type and shape of all stored tensors by name."""
    found: safe.Header = {}
    for file in list_weight_files(folder, config):
        found |= safe.read_tensor_header(file)
    return found


def _compare_with_stored(structures: Structures, stored: safe.Header) -> list[str]:
    """Return a clause for each layer whose stored tensors are not exactly those of its structure."""
    by_layer: dict[str, dict[str, tuple[int, ...]]] = {layer: {} for layer in structures}
    odd: list[str] = []
    for name, (dtype, shape) in stored.items():
        layer = _find_layer(name, structures)
        if layer is None:
            continue
        by_layer[layer][name.removeprefix(f"{layer}.")] = shape
        if dtype not in FLOATS:
            odd.append(f"{name} is stored as {dtype}")
    for layer, structure in structures.items():
        expected, found = structure.shapes(), by_layer[layer]
        if found != expected:
            odd.append(
                f"{layer!r} should have the tensors {_show(expected)} as a {structure.name} of these sizes, "
                f"and the weights have {_show(found)}"
            )
    return odd


def _find_layer(name: str, structures: Structures) -> str | None:
    """Return the layer that a stored tensor lies in."""
    layer = name.rpartition(".")[0]
    while layer:
        if layer in structures:
            return layer
        layer = layer.rpartition(".")[0]
    return None


def _show(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """List tensors with their shapes."""
    shown = []
    for name, shape in sorted(shapes.items())[:5]:
        shown.append(f"{name[:60]} {list(shape)}")
    return ", ".join(shown) or "none"


def locate(model: nn.Module, structures: Structures, config: ModelConfig) -> Structures:
    """Return the structures by the names that their layers have in the plain ``model``.

    Raises ``ConfigError`` for each layer that the model does not have, or that is not one that a structure
    of these sizes could replace.
    """
    weights = {stored: own for own, stored in match_names(model, [f"{x}.weight" for x in structures]).items()}
    parameters = model.named_parameters(remove_duplicate=False)
    uses: dict[int, int] = {}
    for _, parameter in parameters:
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found: Structures = {}
    faults = []
    for layer, structure in structures.items():
        own = weights.get(f"{layer}.weight", "").removesuffix(".weight")
        module = model.get_submodule(own) if own else model
        reason = _find_misfit(model, own, module, structure)
        if not reason and uses[id(module.weight)] > 1:
            reason = "shares its weight with another layer"
        if reason:
            faults.append(f"model.path={config.path}: {FILE}: {layer!r} {reason}.")
        found[own] = structure
    _raise(faults)
    return found


def _find_misfit(model: nn.Module, name: str, module: nn.Module, structure: Structure) -> str:
    """Return why a structure cannot replace a module, as what follows its name; empty if it can."""
    if not name or not is_matrix(module):
        return "is no linear layer of the model that config.json describes"
    if in_head(model, name):
        return "belongs to the model's head, which has no structures"
    rows, columns = module.get_parameter("weight").shape
    outputs, inputs = (columns, rows) if is_transposed(module) else (rows, columns)
    has_bias = "bias" in dict(module.named_parameters(recurse=False))
    if (inputs, outputs, has_bias) != (structure.inputs, structure.outputs, structure.bias):
        return (
            f"has inputs={structure.inputs}, outputs={structure.outputs} and bias={structure.bias}; the "
            f"layer that config.json describes has {inputs}, {outputs} and {has_bias}"
        )
    return ""


def swap(model: nn.Module, located: Structures) -> None:
    """Replace layers of a plain model by the modules of their structures, on the device of the layer."""
    for name, structure in located.items():
        with torch.device(model.get_submodule(name).get_parameter("weight").device):
            replace_module(model, name, structure.build())


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place that has the dotted ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.no_grad()
def fit(structure: Structure, layer: nn.Module) -> StructuredLinear:
    """Return the module of a structure that approximates a linear layer."""
    weight = layer.get_parameter("weight").detach()
    tensors = structure.fit(weight.T if is_transposed(layer) else weight)
    return make_module(structure, tensors, layer)


@torch.no_grad()
def make_module(structure: Structure, tensors: Mapping[str, Tensor], layer: nn.Module) -> StructuredLinear:
    """Return the module of a structure with its tensors, and with the bias of the layer that it replaces."""
    values = dict(tensors)
    if structure.bias:
        values[structure.BIAS] = layer.get_parameter("bias").detach()
    module = structure.build().to(layer.get_parameter("weight"))
    module.load_state_dict(values)
    return module


@torch.no_grad()
def multiply_out(model: Any) -> None:
    """Replace the structures of a model by the layers of its plain class, with the weights they stand for."""
    structures = structures_of(model)
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    for name in structures:
        structured, layer = model.get_submodule(name), plain.get_submodule(name)
        weight = structured.weight.T if is_transposed(layer) else structured.weight
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if structured.structure.bias:
            layer.bias = structured.get_parameter(structured.structure.BIAS)
        replace_module(model, name, layer)


def make_class(plain: type, located: Structures) -> Any:
    """Return a subclass of a transformers model that has structures from its construction on.

    It has the name of the ``plain`` class, to which an instance can be turned back by its ``__class__``.
    """

    def construct(self: Any, *args: Any, **options: Any) -> None:
        plain.__init__(self, *args, **options)  # type: ignore[misc]  # the subclass is made at run time
        swap(self, located)

    names = {"__init__": construct, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (plain,), names)


def write_structures(model: nn.Module, folder: Path) -> None:
    """Write the file, and the manifest beside it, if the ``model`` that ``folder`` holds has structures."""
    structured = structures_of(model)
    if not structured:
        return
    stored = match_names(model, _read_headers(folder, ModelConfig("hf", str(folder))))
    entries: Structures = {}
    for name, structure in structured.items():
        parameter = next(iter(structure.shapes()))
        entries[stored[f"{name}.{parameter}"].removesuffix(f".{parameter}")] = structure
    write_entries(entries, folder)
    manifest.write(folder / FOLDER)


def write_entries(structures: Structures, folder: Path) -> None:
    """Write the file into a model's folder; ``structures`` by the names of the layers in the checkpoint."""
    entries = {}
    for layer, structure in sorted(structures.items()):
        entries[layer] = {"structure": structure.name, **structure.sizes()}
    write_json_atomic(folder / FILE, {**manifest.HEADER, "structures": entries})
