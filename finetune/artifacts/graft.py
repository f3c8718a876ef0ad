"""Write a copy of a model folder that has the head of another model of the same architecture."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..config.settings import ModelConfig
from ..errors import RunFailed
from ..models.folder import read_json
from ..models.sidecar import FILE
from ..models.stored import match_names
from ..storage.atomic import replacing, write_json_atomic
from ..storage.tensor_file import Part, TensorFile, write_tensor_file
from .pass_subject import Subject

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def graft_head(subject: Subject, target: Path) -> Subject:
    """Return the subject in a copy of its folder, ``target``, with the head that it shall have.

    Only tensors of the head, and the labels in config.json, differ. Values are rounded to the dtype of the
    folder. ``target`` is written unless it is there. Raises ``RunFailed``, and removes it, if it holds
    anything else when it is read again.
    """
    assert subject.head is not None
    parent = subject.parents[subject.head]
    file_of = {name: file for file in subject.files for name in file.names}
    stored = match_names(subject.model, file_of)
    file, weight = next(iter(subject.places.values()))
    dtype = DTYPES[file.describe(weight)[0]]
    head = {}
    for name, tensor in parent.head.items():
        head[stored.get(name, name)] = tensor.to(dtype).contiguous()
    loose = target.with_name(f"{target.name}.safetensors")  # the head alone
    with replacing(loose) as temporary:
        save_file(head, temporary)
    placed = _place(subject, TensorFile(loose))
    if not target.exists():
        with replacing(target) as temporary:
            temporary.mkdir()
            _write(subject, parent.labels, placed, temporary)
    files = [TensorFile(target / file.path.name) for file in subject.files]
    try:
        _prove(files, placed)
    except RunFailed:
        shutil.rmtree(target)
        raise
    places = {}
    by_name = {file.path.name: file for file in files}
    for site, (file, name) in subject.places.items():
        places[site] = (by_name[file.path.name], name)
    return replace(subject, folder=target, files=files, places=places)


def _place(subject: Subject, head: TensorFile) -> dict[str, list[Part]]:
    """Return the tensors of each new file, by the file's name. What the model lacks joins the last file."""
    placed: dict[str, list[Part]] = {}
    left = list(head.names)
    for file in subject.files:
        placed[file.path.name] = []
        for name in file.names:
            source = head if name in left else file
            placed[file.path.name].append(Part(name, source, name))
            if name in left:
                left.remove(name)
    placed[subject.files[-1].path.name] += [Part(name, head, name) for name in left]
    return placed


def _write(subject: Subject, labels: tuple[str, ...], placed: Mapping[str, list[Part]], target: Path) -> None:
    for beside in (*sorted(subject.folder.glob("*.json")), subject.folder / FILE):
        if beside.is_file():
            copied = target / beside.relative_to(subject.folder)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(beside, copied)
    named = ModelConfig("hf", str(subject.folder))
    config: dict[str, Any] = read_json(subject.folder / "config.json", named)
    config["id2label"] = {str(row): label for row, label in enumerate(labels)}
    config["label2id"] = {label: row for row, label in enumerate(labels)}
    write_json_atomic(target / "config.json", config)
    for file in subject.files:
        write_tensor_file(target / file.path.name, placed[file.path.name], file.metadata())
    if (subject.folder / INDEX).exists():
        index: dict[str, Any] = read_json(subject.folder / INDEX, named)
        for name, parts in placed.items():
            index["weight_map"].update({part.name: name for part in parts})
        write_json_atomic(target / INDEX, index)


def _prove(files: list[TensorFile], placed: Mapping[str, list[Part]]) -> None:
    """Raise ``RunFailed`` unless the files hold the tensors that were placed in them."""
    for file in files:
        parts = placed[file.path.name]
        wrong = [] if file.names == [part.name for part in parts] else ["the names of its tensors"]
        for part in () if wrong else parts:
            if file.sha256(part.name) != part.file.sha256(part.stored):
                wrong.append(part.name)
        if wrong:
            raise RunFailed(
                f"{file.path} differs from what was written to it when it is read again (first: {wrong[0]}), "
                "so it was removed. Check the disk, and run the command again."
            )
