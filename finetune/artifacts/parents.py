"""Open the further models of a pass: runs or model folders of one base. A folder is read tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..core.roles import in_head
from ..core.site import Site
from ..errors import ConfigError
from ..models.folder import read_json
from ..models.head import HeadMismatch, read_label_names
from ..models.scratch import describe
from .model_files import StoredModel, fingerprint_files, open_files
from .parent import Parent, name_runs
from .parent_run import open_run
from .reopen import run_of


def open_parents(paths: Sequence[Path], base: StoredModel, sites: Sequence[Site]) -> list[Parent]:
    """Open the runs and folders at ``paths``. Raises ``ConfigError`` with the faults of all."""
    found: list[Parent] = []
    faults: list[str] = []
    for path in paths:
        try:
            open_one = open_run if is_run(path) else _open_folder
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
            faults += name_runs(error, path)
    return list(dict.fromkeys(faults))


def _open_folder(path: Path, base: StoredModel, sites: Sequence[Site]) -> Parent:
    """Open a model folder that differs from the base in the weights of ``sites`` and in its head alone."""
    try:
        folder, config, files = open_files(str(path))
        model = describe(folder, config)
    except ConfigError as error:
        raise ConfigError(*name_runs(error, path)) from None
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

    about = {"kind": "model", "method": None, "step": None, "fingerprint": fingerprint_files(files)}
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
