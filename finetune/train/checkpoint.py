"""A session on disk, complete enough to go on to the bit: tensors as safetensors, the rest as JSON; no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .files import RunFolder, replacing, write_json_atomic
from .loop import Session
from .stored import read


def save(folder: Path, session: Session, extra: dict[str, Any]) -> None:
    """Write ``state.safetensors`` and ``state.json``; the folder appears whole or not at all."""
    saved = session.state_dict()
    optimizer = saved["optimizer"]
    tensors: dict[str, Tensor] = {f"states/{k}": v for k, v in saved["states"].items()} | {f"rng/{k}": v for k, v in saved["rng"].items()}
    tensors |= {f"optimizer/{i}/{k}": v for i, entry in optimizer["state"].items() for k, v in entry.items()}
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
        about = {"phase": saved["phase"], "number": saved["number"], "groups": optimizer["param_groups"], "scaler": saved["scaler"], "extra": extra}
        write_json_atomic(temporary / "state.json", about)


def load(folder: Path, session: Session) -> dict[str, Any]:
    """Put a saved state into ``session``; returns the ``extra`` it was saved with. Raises ``ConfigError`` for a damaged file."""
    stored = read(folder / "state.safetensors")
    content = json.loads((folder / "state.json").read_text())
    parts: dict[str, dict[str, Tensor]] = {"states": {}, "rng": {}, "optimizer": {}}
    for name, tensor in stored.items():
        part, _, key = name.partition("/")
        parts[part][key] = tensor
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        place, _, key = name.partition("/")
        entries.setdefault(int(place), {})[key] = tensor
    optimizer = {"state": entries, "param_groups": content["groups"]}
    session.load_state_dict({**content, "states": parts["states"], "rng": parts["rng"], "optimizer": optimizer})
    extra: dict[str, Any] = content["extra"]
    return extra


def newest(files: RunFolder) -> Path | None:
    """The checkpoint of the latest step in a run's folder."""
    found = [p for p in (files.path / "checkpoints").glob("step-*") if (p / "state.json").is_file()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)
