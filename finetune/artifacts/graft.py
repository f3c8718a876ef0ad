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
from .model_files import map_files
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
    stored = match_names(subject.model, map_files(subject.files))
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
    places, file_of = {}, map_files(files)
    for site, (_, name) in subject.places.items():
        places[site] = (file_of[name], name)
    return replace(subject, folder=target, files=files, places=places)


def _place(subject: Subject, head: TensorFile) -> dict[str, list[Part]]:
    """Return the tensors of each new file, by the file's name. What the model lacks joins the last file."""
    placed: dict[str, list[Part]] = {}
    left = dict.fromkeys(head.names)
    for file in subject.files:
        parts = placed[file.path.name] = []
        for name in file.names:
            parts.append(Part(name, head if name in left else file, name))
            left.pop(name, None)
    for name in left:
        parts.append(Part(name, head, name))
    return placed


def _write(subject: Subject, labels: tuple[str, ...], placed: Mapping[str, list[Part]], target: Path) -> None:
    for beside in (*sorted(subject.folder.glob("*.json")), subject.folder / FILE):
        if beside.is_file():
            copied = target / beside.relative_to(subject.folder)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(beside, copied)
    named = ModelConfig("hf", str(subject.folder))
    config: dict[str, Any] = read_json(subject.folder / "config.json", named)
    config["id2label"], config["label2id"] = {}, {}
    for row, label in enumerate(labels):
        config["id2label"][str(row)], config["label2id"][label] = label, row
    write_json_atomic(target / "config.json", config)
    for file in subject.files:
        write_tensor_file(target / file.path.name, placed[file.path.name], file.metadata())
    if (subject.folder / INDEX).exists():
        index: dict[str, Any] = read_json(subject.folder / INDEX, named)
        for name, parts in placed.items():
            for part in parts:
                index["weight_map"][part.name] = name
        write_json_atomic(target / INDEX, index)


def _prove(files: list[TensorFile], placed: Mapping[str, list[Part]]) -> None:
    """Raise ``RunFailed`` unless the files hold the tensors that were placed in them."""
    for file in files:
        wrong, names = [], []
        for part in placed[file.path.name]:
            names.append(part.name)
            if part.name not in file.names or file.sha256(part.name) != part.file.sha256(part.stored):
                wrong.append(part.name)
        if names != file.names:
            wrong.append("the names of its tensors")
        if wrong:
            raise RunFailed(
                f"{file.path} differs from what was written to it when it is read again (first: {wrong[0]}), "
                "so it was removed. Check the disk, and run the command again."
            )
