"""Check what every structure must guarantee: ``check_structure(partial(LowRank, rank=3))``.

The argument makes the structure of a layer from ``inputs``, ``outputs`` and ``bias``. The class must be
registered, since a model folder names it.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts.plain import read
from ..config.settings import ModelConfig
from ..core.site import find_sites
from ..core.structure import Structure
from ..data.encode import collate
from ..errors import ConfigError
from ..models.sidecar import FILE, LARGEST, fit, read_structures, replace_module, write_structures
from .sessions import Kind, examples, tiny

Make = Callable[..., Structure]
SHAPES = ((12, 8), (8, 12))  # [out, in]; all sides of the layers are multiples of 4
TASKS = {"vit": "image_classification", "gpt2": "causal_lm", "llama": "causal_lm"}
Entries = dict[str, Any]  # of the file of structures, by layer


@dataclass
class StructureTrial:
    """Structures in a tiny model of one kind. Folders are made in ``root``."""

    make: Make
    kind: Kind
    root: Path

    def structures(self) -> Iterator[Structure]:
        """Yield structures of several shapes, with and without bias."""
        for outputs, inputs in SHAPES:
            for bias in (False, True):
                yield self.make(inputs=inputs, outputs=outputs, bias=bias)

    def model(self) -> Any:
        """Return a model all of whose sites are replaced by structures that fit them."""
        model = tiny(self.kind).requires_grad_(False)
        for site in find_sites(model, ("all",)):
            made = self.make(inputs=site.shape[1], outputs=site.shape[0], bias=site.has_bias)
            replace_module(model, site.name, fit(made, site.module))
        return model.eval()

    def folder(self, name: str = "model") -> Path:
        """Write the model into the folder ``name`` unless it is there; return the folder."""
        place = self.root / name
        if not place.exists():
            model = self.model()
            model.save_pretrained(place)
            write_structures(model, place)
        return place

    def read(self, folder: Path) -> Any:
        """Read the model of a folder."""
        return read(folder, TASKS[self.kind], "float32")


def check_sizes(trial: StructureTrial) -> None:
    """The module has the parameters that ``shapes`` names, on the meta device too, and no buffers."""
    for structure in trial.structures():
        for name, size in structure.sizes().items():
            assert type(size) in (int, bool), f"{name}={size!r} is neither a whole number nor a boolean"
        assert not structure.faults(), structure.faults()
        shapes = structure.shapes()
        assert (structure.BIAS in shapes) == structure.bias, f"BIAS={structure.BIAS} is not in shapes"
        for device in ("meta", "cpu"):
            with torch.device(device):
                module = structure.build()
            found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
            assert found == shapes, f"the module has {found}, and shapes says {shapes}"
            assert not list(module.buffers()), "the module has buffers, which no folder holds"


def check_function(trial: StructureTrial) -> None:
    """The module computes what the dense weight computes; ``fit`` is pure and keeps the dtype."""
    generator = torch.Generator().manual_seed(0)
    for structure in trial.structures():
        weight = torch.randn(structure.outputs, structure.inputs, generator=generator)
        before = weight.clone()
        tensors = structure.fit(weight)
        assert torch.equal(weight, before), "fit changes the weight that it was given"
        for name, tensor in structure.fit(weight).items():
            assert torch.equal(tensor, tensors[name]), f"{name} differs in a second fit of the same weight"
        for name, tensor in structure.fit(weight.bfloat16()).items():
            assert tensor.dtype == torch.bfloat16, f"{name} of a bfloat16 weight is {tensor.dtype}"
        dense = structure.dense(tensors)
        assert dense.shape == weight.shape, f"dense gives {list(dense.shape)}, not {list(weight.shape)}"
        layer = torch.nn.Linear(structure.inputs, structure.outputs, bias=structure.bias)
        layer.weight.data = weight
        module = fit(structure, layer).double()
        x = torch.randn(2, 3, structure.inputs, generator=generator, dtype=torch.float64)
        expected = x @ dense.T
        if layer.bias is not None:
            expected = expected + layer.bias.detach()
        y = module(x)
        assert torch.allclose(y, expected, atol=1e-10), "the module and its dense weight differ"
        y.square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"


def check_read_back(trial: StructureTrial) -> None:
    """A folder that is written and read has the same tensors and logits, and so has a second one."""
    model, folder = trial.model(), trial.folder()
    loaded = trial.read(folder)
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} is read back with other values"
    assert torch.equal(_logits(loaded, trial.kind), _logits(model, trial.kind)), "the logits differ"
    second = trial.root / "second"
    loaded.save_pretrained(second)
    write_structures(loaded, second)
    for name in ("model.safetensors", FILE):
        assert (second / name).read_bytes() == (folder / name).read_bytes(), f"{name} is written differently"


@torch.no_grad()
def _logits(model: Any, kind: Kind) -> Tensor:
    logits: Tensor = model(**collate(examples(kind, 4)).inputs).logits
    return logits


def check_hostile(trial: StructureTrial) -> None:
    """A file of structures that does not fit its folder is refused, whatever is wrong with it."""
    folder = trial.folder()
    structures = read_structures(folder, ModelConfig("hf", str(folder)))
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    for what, entries in _spoil(content["structures"], structures):
        text = json.dumps({**content, "structures": entries})
        (folder / FILE).write_text(text, encoding="utf-8")
        try:
            trial.read(folder)
        except ConfigError:
            continue
        raise AssertionError(f"a file of structures with {what} is read")


def _spoil(entries: Entries, structures: dict[str, Structure]) -> Iterator[tuple[str, Entries]]:
    """Yield files that must be refused, each with what is wrong with it."""
    layer = next(iter(entries))
    own, structure = entries[layer], structures[layer]
    others = {name: entry for name, entry in entries.items() if name != layer}
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    for size, value in structure.sizes().items():
        if isinstance(value, bool):
            wrong: list[Any] = [int(value), not value, "true", None]
        else:
            wrong = [0, -value, LARGEST, 2**40, 2**70, float(value), True, str(value), None, deep]
            larger: dict[str, Any] = {size: value + 1}
            if replace(structure, **larger).shapes() != structure.shapes():
                wrong.append(value + 1)
        for bad in wrong:
            yield f"{size}={str(bad)[:20]}", {**entries, layer: {**own, size: bad}}
        lacking = {key: value for key, value in own.items() if key != size}
        yield f"no {size}", {**entries, layer: lacking}
    for name in ("no_such_structure", "finetune.structures.low_rank", "", 5, None):
        yield f"structure={name!r}", {**entries, layer: {**own, "structure": name}}
    yield "another size", {**entries, layer: {**own, "path": "/etc/passwd"}}
    for name in ("", "..", f"../{layer}", f".{layer}", f"{layer}.", "a b", "no.such.layer", "a" * 500):
        yield f"a layer {name[:20]!r}", {**others, name: own}
    first = next(iter(structure.shapes())).partition(".")[0]
    yield "a layer in a layer", {**entries, f"{layer}.{first}": own}
    yield "a layer twice", {**others, layer.rpartition(".")[0]: own, layer: copy.deepcopy(own)}
    yield "a layer left out", others
    yield "no layers", {}
    yield "a list", {**entries, layer: [own]}


STRUCTURE_CHECKS = {
    "sizes": check_sizes,
    "function": check_function,
    "read back": check_read_back,
    "hostile": check_hostile,
}


def check_structure(make: Make, kind: Kind = "llama") -> None:
    """Run every check of ``STRUCTURE_CHECKS`` on a tiny model of two blocks."""
    for run_check in STRUCTURE_CHECKS.values():
        with tempfile.TemporaryDirectory() as folder:
            run_check(StructureTrial(make, kind, Path(folder)))
