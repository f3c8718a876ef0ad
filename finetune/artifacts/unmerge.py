"""From a merged folder back to its base, to the bit.

Whatever the method, the base's own entries are kept in the merged folder where rounding and change moved them, as long as that takes at most half of
the base's bytes: sparse changes and those of few parameters, not low-rank ones, which move every entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.settings import ModelConfig
from ..core.sparse.coding import decode_sorted, encode_sorted
from ..core.sparse.switch import BITS
from ..errors import ConfigError
from ..models.load import AUTO, fingerprint, original_parameters, save
from ..models.processor import read_processor
from ..storage import manifest
from ..storage.delta import read_tensors
from ..system import safe
from ..training.prepare import Setup
from .plain import check_free, read, writing_folder

DTYPES = {"float32", "bfloat16", "float16"}
LIKE = {
    "task": str,
    "dtype": str,
    "head": [str],
    "unmerge": str,
    "base": str,
    "base_dtype": str,
    "base_fingerprint": str,
}
FOLDER, ABOUT, ORIGINALS = "finetune", "merge.json", "originals.safetensors"
SHARE = 0.5  # of the base's bytes: with more, a copy of the base is the better way back


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(BITS[t.element_size()])


def store(setup: Setup, folder: Path) -> dict[str, Any]:
    """Write what leads from the merged model of ``setup`` back to its base, if that is little; returns what ``merge.json`` must say of it."""
    folder.mkdir()
    model, config = setup.session.model, setup.config.model
    merged = dict(model.named_parameters())
    tensors, size, room = (
        dict[str, Tensor](),
        0,
        SHARE * sum(p.numel() for p in merged.values()) * torch.finfo(getattr(torch, config.dtype)).bits / 8,
    )
    for name, original in original_parameters(setup.base):
        new = _originals(name, original, merged[name].detach().cpu())
        size += sum(t.nbytes for t in new.values())
        if size > room:
            tensors = {}
            break
        tensors |= new
    told = {"base": config.path, "base_dtype": config.dtype, "base_fingerprint": setup.fingerprint}
    if size > room:
        return {
            **told,
            "unmerge": f"not possible: nearly every entry differs from the base; the base itself is {config.path}",
        }
    save_file(tensors, folder / ORIGINALS)
    return {**told, "unmerge": "possible"}


def _originals(name: str, original: Tensor, merged: Tensor) -> dict[str, Tensor]:
    """The entries of a base's parameter that its merged one has lost, by position or, where that is shorter, all."""
    here, back = _bits(original), _bits(merged.to(original.dtype))
    where = (here != back).nonzero().view(-1)
    if not len(where):
        return {}
    sparse = {f"gaps/{name}": encode_sorted(where), f"values/{name}": original.reshape(-1)[where]}
    return (
        sparse
        if sum(t.nbytes for t in sparse.values()) < original.nbytes
        else {f"all/{name}": original.contiguous()}
    )


@torch.no_grad()
def unmerge(path: Path, out: Path) -> dict[str, Any]:
    """Write the base of the merged folder ``path`` to ``out``, with its new head, if any, as it started.

    Raises ``ConfigError``, with nothing written, where the originals are not stored or do not give the very base.
    """
    check_free(out)
    about = _about(path)
    if about["unmerge"] != "possible":
        raise ConfigError(f"{path} cannot be unmerged: {about['unmerge'].removeprefix('not possible: ')}.")
    model = read(path, about["task"], about["dtype"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, about["base_dtype"]))
    entries = _put_back(model, path / FOLDER / ORIGINALS)
    if fingerprint(model, about["head"]) != about["base_fingerprint"]:
        raise ConfigError(
            f"{path} does not lead back to its base: it was changed after merging. Restore it, or take the base, {about['base']}."
        )
    processor, _ = read_processor(path, ModelConfig("merged", str(path)), about["task"], model)
    with writing_folder(out) as temporary:
        save(model, processor, temporary)
    return {
        "out": str(out),
        "base": about["base"],
        "base_fingerprint": about["base_fingerprint"],
        "entries_put_back": entries,
    }


def _about(path: Path) -> dict[str, Any]:
    file = path / FOLDER / ABOUT
    try:
        about: Any = safe.read_json(file, LIKE)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}). Give the folder that finetune merge wrote."
        ) from error
    if newer := safe.too_new(file, about):
        raise ConfigError(f"{newer}.")
    if about["task"] not in AUTO or not {about["dtype"], about["base_dtype"]} <= DTYPES:
        raise ConfigError(
            f"{file} names a task or a type of weights that there is not. Give the folder that finetune merge wrote."
        )
    manifest.check(path / FOLDER)
    found: dict[str, Any] = about
    return found


def _put_back(model: nn.Module, file: Path) -> int:
    """Write the stored originals into ``model``; returns how many. Raises ``ConfigError`` where they do not fit it."""
    parameters, count = dict(model.named_parameters()), 0
    content = read_tensors(file)
    for key, values in content.items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        where = (
            decode_sorted(content[f"gaps/{name}"], len(values))
            if kind == "values" and f"gaps/{name}" in content
            else None
        )
        if kind == "gaps":
            continue
        if (
            parameter is None
            or parameter.dtype != values.dtype
            or (where is None and (kind != "all" or parameter.shape != values.shape))
        ):
            raise ConfigError(
                f"{file} does not fit the model beside it (first: {name}). Copy the merged folder again from where it was made."
            )
        if where is not None and (values.ndim != 1 or (len(where) and int(where[-1]) >= parameter.numel())):
            raise ConfigError(
                f"{file} does not fit the model beside it (first: {name}). Copy the merged folder again from where it was made."
            )
        if where is None:
            parameter.copy_(values)
        else:
            parameter.view(-1)[where] = values
        count += values.numel()
    return count
