"""Write a model folder in which a pass has replaced weights by the tensors of structures.

The tensors of each finished site are kept in a small file of their own. When all sites are finished, new
files of weights are put together from them and from the model's other tensors, piece by piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import registry
from ..config.settings import ModelConfig
from ..core.site import Site
from ..core.structure import Structure, Structured
from ..errors import RunFailed
from ..models.sidecar import FILE, Structures, read_structures, write_entries
from ..storage.atomic import replacing, write_json_atomic
from ..storage.tensor_file import Part, TensorFile, raw_bytes, write_tensor_file
from .pass_subject import Subject, turned

INDEX = "model.safetensors.index.json"
Row = dict[str, Any]


def check_structured(method: str, site: Site, weight: Tensor, new: Structured) -> None:
    """Raise ``RunFailed`` unless a structure and its tensors can replace the weight of a site."""
    structure, found = new.structure, dict[str, tuple[int, ...]]()
    for name, tensor in new.tensors.items():
        found[name] = tuple(tensor.shape) if tensor.dtype == weight.dtype else (-1,)
    expected = structure.shapes()
    if structure.bias:
        expected.pop(structure.BIAS)
    outer = (structure.outputs, structure.inputs, structure.bias)
    if found != expected or outer != (*site.shape, site.has_bias) or structure.faults():
        raise RunFailed(
            f"method={method} made a {structure.name} for {site.name} that does not fit it: {found} in "
            f"{structure.sizes()}, for a {weight.dtype} of shape {list(weight.shape)}."
        )


class StructuredOutput:
    """The new files of weights in ``target``; ``tensors``: a folder for those of finished sites."""

    def __init__(self, subject: Subject, target: Path, tensors: Path) -> None:
        self.subject, self.target, self.tensors = subject, target, tensors
        tensors.mkdir(exist_ok=True)
        self._number = {site.name: number for number, site in enumerate(subject.sites)}

    def _file(self, site: str) -> Path:
        return self.tensors / f"{self._number[site]}.safetensors"

    def write(self, site: Site, new: Structured) -> Row:
        """Keep the tensors of a site; return what its row says of them."""
        tensors, digests = {}, {}
        for name, tensor in new.tensors.items():
            tensors[name] = tensor.contiguous()
            digests[name] = hashlib.sha256(raw_bytes(tensors[name])).hexdigest()
        with replacing(self._file(site.name)) as temporary:
            save_file(tensors, temporary)
        return {"sha256": digests}

    def read(self, site: Site, row: Row) -> Tensor:
        """Return the weight that the tensors of a finished site stand for, in the layout of its module."""
        return turned(_structure_of(row).dense(load_file(self._file(site.name))), site)

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the files of weights, their index, and the file that names the structures."""
        weight_map: dict[str, str] = {}
        total = 0
        for file in self.subject.files:
            parts = self._list_parts(file, rows)
            write_tensor_file(self.target / file.path.name, parts, file.metadata())
            for part in parts:
                weight_map[part.name] = file.path.name
                total += part.file.size(part.stored)
        if (self.target / INDEX).exists():
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json_atomic(self.target / INDEX, index)
        write_entries(self._list_structures(rows), self.target)

    def _list_parts(self, file: TensorFile, rows: Sequence[Row]) -> list[Part]:
        """Return the tensors of the new file in the place of ``file``, in their order.

        The tensors of a structure stand where the weight stood, and its bias where the layer's bias stood.
        """
        row_of: dict[str, Row] = {}
        bias_of: dict[str, str] = {}
        for row in rows:
            row_of[row["tensor"]] = row
            if row["structure"]["bias"]:
                layer = _layer_of(row)
                bias_of[f"{layer}.bias"] = f"{layer}.{_structure_of(row).BIAS}"
        parts = []
        for name in file.names:
            if name not in row_of:
                parts.append(Part(bias_of.get(name, name), file, name))
                continue
            made = TensorFile(self._file(row_of[name]["site"]))
            for inner in made.names:
                parts.append(Part(f"{_layer_of(row_of[name])}.{inner}", made, inner))
        return parts

    def _list_structures(self, rows: Sequence[Row]) -> Structures:
        """Return the structure of each layer by its name in the folder, those of the model included."""
        found = dict(self.subject.structures)
        for row in rows:
            found[_layer_of(row)] = _structure_of(row)
        return found

    def prove(self, rows: Sequence[Row]) -> None:
        """Read everything back and raise ``RunFailed`` unless it is what it must be.

        The tensors of a structure must have the bytes that were computed, all others those of the model.
        """
        computed: dict[str, str] = {}
        for row in rows:
            for inner, digest in row["sha256"].items():
                computed[f"{_layer_of(row)}.{inner}"] = digest
        for file in self.subject.files:
            parts, written = self._list_parts(file, rows), TensorFile(self.target / file.path.name)
            wrong = [] if written.names == [part.name for part in parts] else ["the names of its tensors"]
            for part in () if wrong else parts:
                expected = computed.get(part.name) or file.sha256(part.stored)
                if written.sha256(part.name) != expected:
                    wrong.append(part.name)
            if wrong:
                raise_not_proved(written.path, wrong[0])
        found = read_structures(self.target, ModelConfig("hf", str(self.target)))
        if found != self._list_structures(rows):
            raise_not_proved(self.target / FILE, "a structure")

    def files(self) -> list[TensorFile]:
        """Return the files of weights."""
        found = []
        for file in self.subject.files:
            found.append(TensorFile(self.target / file.path.name))
        return found


def raise_not_proved(file: Path, first: str) -> None:
    """Raise ``RunFailed`` for a file that differs from what was written to it."""
    raise RunFailed(
        f"{file} differs from what was written to it when it is read again (first: {first}), so it was "
        "removed. Check the disk, and run the command again."
    )


def _layer_of(row: Row) -> str:
    """Return the name of a site's layer in the folder."""
    name: str = row["tensor"]
    return name.removesuffix(".weight")


def _structure_of(row: Row) -> Structure:
    """Return the structure that the row of a site names."""
    sizes = dict(row["structure"])
    structure: Structure = registry.get("structure", sizes.pop("structure"))(**sizes)
    return structure
