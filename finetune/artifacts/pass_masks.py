"""Write the masks of a pass beside the weights: which entries are pruned and stay 0 (``models/masks.py``)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.passes import Pruned
from ..core.site import Site
from ..core.structure import Structured
from ..errors import RunFailed
from ..models.masks import FILE, pack_mask, packed_shape
from ..storage.atomic import replacing
from ..storage.tensor_file import TensorFile, create_file, raw_bytes
from .pass_subject import Request, Subject, turned


def create_masks(request: Request, subject: Subject, target: Path) -> TensorFile | None:
    """Create the masks in the unfinished folder ``target``, unless they are there; return their file.

    They begin as those of the model, with every entry of other sites live. None if the pass does not prune
    and the model has no masks.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if request.method.verb == "prune":
        for file, name in subject.places.values():
            shapes[name] = packed_shape(file.describe(name)[1])
    if subject.masks is not None:
        for name in subject.masks.names:
            shapes[name] = subject.masks.describe(name)[1]
    if request.writes_structures:  # the weights of the sites are replaced
        for _, name in subject.places.values():
            shapes.pop(name, None)
    if not shapes:
        return None
    columns: dict[str, int] = {}
    for file in subject.files:
        for name in file.names:
            if name in shapes:
                columns[name] = file.describe(name)[1][1]

    def read(name: str) -> Tensor:
        if subject.masks is not None and name in subject.masks.names:
            return subject.masks.read(name)
        return pack_mask(torch.zeros(shapes[name][0], columns[name], dtype=torch.bool))

    created = target / FILE
    if not created.exists():
        with replacing(created) as temporary:
            create_file(temporary, "U8", shapes, read)
    return TensorFile(created)


def update_mask(
    subject: Subject, masks: TensorFile | None, site: Site, result: object, new: Tensor | Structured
) -> dict[str, Any]:
    """Write the mask of a site and return what its row says of it; nothing without masks.

    Entries that a pass before has pruned stay pruned, unless this pass gives them a value.
    """
    name = subject.places[site.name][1]
    if masks is None or name not in masks.names or not isinstance(new, Tensor):
        return {}
    held = torch.zeros(new.shape, dtype=torch.bool)
    if isinstance(result, Pruned):
        held |= result.zeros.cpu()
        if new.cpu()[held].count_nonzero():
            raise RunFailed(f"The pass says that it pruned entries of {site.name} that it has not set to 0.")
    freed = 0
    before = subject.read_mask(site)
    if before is not None:
        held |= before & (new == 0).cpu()
        freed = int((before & ~held).sum())
    packed = pack_mask(turned(held, site))
    masks.overwrite(name, packed)
    row = {"held": int(held.sum()), "mask_sha256": hashlib.sha256(raw_bytes(packed)).hexdigest()}
    return {**row, "freed": freed} if freed else row


def prove_masks(subject: Subject, masks: TensorFile | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Read every mask back and raise ``RunFailed`` unless its bytes are what they must be."""
    if masks is None:
        return
    computed = {row["tensor"]: row["mask_sha256"] for row in rows if "mask_sha256" in row}
    for name in masks.names:
        expected = computed.get(name)
        if expected is None and subject.masks is not None:
            expected = subject.masks.sha256(name)
        if expected is not None and masks.sha256(name) != expected:
            raise RunFailed(
                f"{masks.path} differs from what was written to it when it is read again (first: {name}), so "
                "it was removed. Check the disk, and run the command again."
            )
