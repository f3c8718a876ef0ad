"""Restore the base from a merged folder, to the bit.

With any method, merging stores the base's original entries wherever the change or rounding altered them, if
these take at most half of the base's bytes. That holds for sparse changes and for changes of few parameters,
and not for low-rank ones, which move every entry.
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
from ..models.folder import AUTO
from ..models.load import original_parameters, save
from ..models.masks import hold_stored_zeros, write_masks
from ..models.processor import read_processor
from ..models.stored import fingerprint
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
SHARE = 0.5  # of the base's bytes; above it, keeping a copy of the base is better


def _bits(t: Tensor) -> Tensor:
    """View a tensor as integers, so that comparisons are to the bit."""
    return t.contiguous().view(-1).view(BITS[t.element_size()])


def store(setup: Setup, folder: Path, obstacle: str = "") -> dict[str, Any]:
    """Write the entries that restore the base of the merged ``setup``, unless there are too many.

    ``obstacle``: why the base cannot be restored, whatever the entries are. Returns what ``merge.json`` must
    record about the base.
    """
    folder.mkdir(exist_ok=True)
    merged, config = dict(setup.session.model.named_parameters()), setup.config.model
    about = {"base": config.path, "base_dtype": config.dtype, "base_fingerprint": setup.fingerprint}
    if obstacle:
        return {**about, "unmerge": f"not possible: {obstacle}; the base itself is {config.path}"}
    entries = sum(p.numel() for p in merged.values())
    limit = SHARE * entries * torch.finfo(getattr(torch, config.dtype)).bits / 8
    tensors, size = dict[str, Tensor](), 0
    for name, original in original_parameters(setup.base):
        lost = _lost_entries(name, original, merged[name].detach().cpu())
        size += sum(t.nbytes for t in lost.values())
        if size > limit:
            reason = f"nearly every entry differs from the base; the base itself is {config.path}"
            return {**about, "unmerge": f"not possible: {reason}"}
        tensors |= lost
    save_file(tensors, folder / ORIGINALS)
    return {**about, "unmerge": "possible"}


def _lost_entries(name: str, original: Tensor, merged: Tensor) -> dict[str, Tensor]:
    """Return the entries that a merged parameter has lost: by position, or all if that is shorter."""
    where = (_bits(original) != _bits(merged.to(original.dtype))).nonzero().view(-1)
    if not len(where):
        return {}
    by_position = {f"gaps/{name}": encode_sorted(where), f"values/{name}": original.reshape(-1)[where]}
    if sum(t.nbytes for t in by_position.values()) < original.nbytes:
        return by_position
    return {f"all/{name}": original.contiguous()}


@torch.no_grad()
def unmerge(path: Path, out: Path) -> dict[str, Any]:
    """Write the base of the merged folder ``path`` to ``out``. A new head is written as it was at the start.

    Raises ``ConfigError``, with nothing written, if the originals are not stored or do not give exactly the
    base.
    """
    check_free(out)
    about = _read_about(path)
    if about["unmerge"] != "possible":
        raise ConfigError(f"{path} cannot be unmerged: {about['unmerge'].removeprefix('not possible: ')}.")
    model = read(path, about["task"], about["dtype"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, about["base_dtype"]))
    entries = _restore_entries(model, path / FOLDER / ORIGINALS)
    if fingerprint(model, about["head"]) != about["base_fingerprint"]:
        raise ConfigError(
            f"{path} cannot be unmerged: it was changed after merging. Restore it, or take the "
            f"base, {about['base']}."
        )
    config = ModelConfig("merged", str(path))
    hold_stored_zeros(path, config, model)
    processor, _ = read_processor(path, config, about["task"], model)
    with writing_folder(out) as temporary:
        save(model, processor, temporary)
        if write_masks(model, temporary, config):
            manifest.write(temporary / FOLDER)
    return {
        "out": str(out),
        "base": about["base"],
        "base_fingerprint": about["base_fingerprint"],
        "entries_put_back": entries,
    }


def _read_about(path: Path) -> dict[str, Any]:
    """Read and check ``merge.json`` of a merged folder."""
    file = path / FOLDER / ABOUT
    try:
        about: Any = safe.read_json(file, LIKE)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}). Give the folder that finetune merge wrote."
        ) from error
    if newer := safe.explain_newer_format(file, about):
        raise ConfigError(f"{newer}.")
    if about["task"] not in AUTO or not {about["dtype"], about["base_dtype"]} <= DTYPES:
        raise ConfigError(
            f"{file} names an unknown task or dtype. Give the folder that finetune merge wrote."
        )
    manifest.check(path / FOLDER)
    found: dict[str, Any] = about
    return found


def _restore_entries(model: nn.Module, file: Path) -> int:
    """Write the stored originals into ``model`` and return their number.

    Raises ``ConfigError`` if they do not fit the model.
    """
    parameters, count = dict(model.named_parameters()), 0
    content = read_tensors(file)
    for key, values in content.items():
        kind, _, name = key.partition("/")
        if kind == "gaps":
            continue
        gaps = content.get(f"gaps/{name}") if kind == "values" else None
        where = None if gaps is None else decode_sorted(gaps, len(values))
        parameter = parameters.get(name)
        if parameter is None or not _entries_fit(kind, values, where, parameter):
            raise ConfigError(
                f"{file} does not fit the model beside it (first: {name}). "
                "Copy the merged folder again from where it was made."
            )
        if where is None:
            parameter.copy_(values)
        else:
            parameter.view(-1)[where] = values
        count += values.numel()
    return count


def _entries_fit(kind: str, values: Tensor, where: Tensor | None, parameter: Tensor) -> bool:
    """Tell whether stored entries, at the positions ``where`` or of the whole parameter, fit it."""
    if values.dtype != parameter.dtype:
        return False
    if where is None:
        return kind == "all" and values.shape == parameter.shape
    return values.ndim == 1 and (not len(where) or int(where[-1]) < parameter.numel())
