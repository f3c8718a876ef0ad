"""Store a session so that it can resume to the bit: tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is a folder: ``state.safetensors`` has the tensors of the states, the optimizer and the random
generators, ``state.json`` the rest, ``manifest.json`` their checksums. The best change so far lies beside
them.

The optimizer's tensors are named ``optimizer/POSITION/KEY``. ``parameters`` in ``state.json`` gives the name
of the parameter at each position. Early checkpoints lack this list; their positions count through the
optimizer's parameters in the order of its groups. Some optimizers keep plain numbers as well, such as a count
of steps: these are ``numbers`` in ``state.json``, by position and key.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, RunFailed
from ..system import safe
from ..system.disk import safetensors_errors_as_os_errors
from . import manifest
from .atomic import write_json_atomic
from .delta import read_tensors
from .run_folder import RunFolder

CURE = "Resume from another checkpoint, or train again."
STATE_SCHEMA = {
    "phase": int,
    "number": int,
    "groups": [{"params": [int]}],
    "parameters?": [str],
    "numbers?": {str: {str: int | float | bool | None}},
    "scaler": object,
    "extra": {},
}


class Saved(Protocol):
    """A session, or a copy of its state."""

    def state_dict(self) -> dict[str, Any]:
        """Return ``states``, ``rng`` and ``optimizer`` (see ``name_tensors``), and values for JSON."""


class Loadable(Protocol):
    """A session that can resume from a saved state."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. Raises an error such as ``ValueError`` if it does not fit."""


def save(folder: Path, session: Saved, extra: dict[str, Any], best: Path | None = None) -> None:
    """Write a checkpoint; the folder appears whole or not at all.

    ``extra``: values that JSON can hold, for ``load`` to return. ``best``: the folder of the best change so
    far. It is copied, because the run may store a better one and be interrupted before its next checkpoint.
    """
    saved = session.state_dict()
    positions = _positions(saved["optimizer"])
    groups = []
    for group in saved["optimizer"]["param_groups"]:
        groups.append({**group, "params": [positions[name] for name in group["params"]]})
    content = {
        **manifest.HEADER,
        "phase": saved["phase"],
        "number": saved["number"],
        "scaler": saved["scaler"],
    }
    content |= {"groups": groups, "parameters": list(positions), "extra": extra}
    if numbers := _numbers_of(saved["optimizer"], positions):
        content["numbers"] = numbers
    folder.parent.mkdir(exist_ok=True)
    with manifest.sealed_folder(folder) as temporary:
        file = temporary / "state.safetensors"
        with safetensors_errors_as_os_errors(file):
            save_file(name_tensors(saved), file)
        write_json_atomic(temporary / "state.json", content)
        if best is not None:
            _copy_change(best, temporary)


def name_tensors(saved: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a session's state on the CPU, by their names in ``state.safetensors``.

    ``saved["optimizer"]`` is ``torch.optim.Optimizer.state_dict()`` with the names of the parameters in place
    of their numbers.
    """
    found = {}
    for kind in ("states", "rng"):
        for name, tensor in saved[kind].items():
            found[f"{kind}/{name}"] = tensor
    positions = _positions(saved["optimizer"])
    for name, entry in saved["optimizer"]["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                found[f"optimizer/{positions[name]}/{key}"] = value
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _numbers_of(optimizer: dict[str, Any], positions: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return the values of the optimizer's state that are not tensors, by position and key.

    Raises ``RunFailed`` for a value that is neither a tensor nor a finite number nor ``None``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, entry in optimizer["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                continue
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise RunFailed(
                    f"The optimizer keeps {key}={str(value)[:40]} for {name}, which a checkpoint cannot "
                    "hold. It may keep tensors, finite numbers and None."
                )
            found.setdefault(str(positions[name]), {})[key] = value
    return found


def _positions(optimizer: dict[str, Any]) -> dict[str, int]:
    """Number the names of the optimizer's parameters from 0, in the order of its groups."""
    found: dict[str, int] = {}
    for group in optimizer["param_groups"]:
        for name in group["params"]:
            found[name] = len(found)
    return found


def load(folder: Path, session: Loadable) -> dict[str, Any]:
    """Put a saved state into ``session``; return the ``extra`` that it was saved with.

    Raises ``ConfigError`` if a file is damaged, of a later format, or belongs to another method or model.
    """
    content = _read_state(folder)
    manifest.check(folder)
    stored = read_tensors(folder / "state.safetensors")
    try:
        session.load_state_dict({**content, **_sort_tensors(stored, content)})
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{folder} is not a state of this method and model ({why}). {CURE}") from error
    extra: dict[str, Any] = content["extra"]
    return extra


def _sort_tensors(stored: dict[str, Tensor], content: dict[str, Any]) -> dict[str, Any]:
    """Return ``states``, ``rng`` and ``optimizer`` as ``state_dict`` gave them.

    The optimizer's parameters are named, or numbered where the checkpoint has no names.
    """
    found: dict[str, dict[str, Any]] = {"states": {}, "rng": {}, "optimizer": {}}
    for name, tensor in stored.items():
        kind, _, key = name.partition("/")
        found[kind][key] = tensor
    groups, names = content["groups"], content.get("parameters")
    positions = [place for group in groups for place in group["params"]]
    if sorted(positions) != list(range(len(positions))):
        raise ValueError("the optimizer's groups do not number their parameters from 0")
    if names is None:
        names = list(range(len(positions)))
    elif len(names) != len(positions) or len({*names}) != len(names):
        raise ValueError(f"there are {len({*names})} names for the optimizer's {len(positions)} parameters")
    values: list[tuple[str, str, Any]] = []
    for name, tensor in found["optimizer"].items():
        place, _, key = name.partition("/")
        values.append((place, key, tensor))
    for place, numbers in content.get("numbers", {}).items():
        values += [(place, key, number) for key, number in numbers.items()]
    entries: dict[int | str, dict[str, Any]] = {}
    for place, key, value in values:
        if int(place) not in positions:
            raise ValueError(f"the optimizer's groups have no parameter {int(place)}")
        entry = entries.setdefault(names[int(place)], {})
        if key in entry:
            raise ValueError(f"the optimizer's {key} is there twice, as a tensor and as a number")
        entry[key] = value
    groups = [{**group, "params": [names[place] for place in group["params"]]} for group in groups]
    return {**found, "optimizer": {"state": entries, "param_groups": groups}}


def restore_best(folder: Path, delta: Path) -> None:
    """Restore the best change in the checkpoint ``folder`` as the run's stored change.

    Checkpoints of early versions, and those made before the first validation, have none.
    """
    if (folder / "delta.json").is_file():
        with manifest.sealed_folder(delta) as temporary:
            _copy_change(folder, temporary)


def _copy_change(source: Path, target: Path) -> None:
    """Copy the files of a change. A hard link would save space, but damage to one would damage both."""
    for file in sorted(source.glob("delta.*")):
        shutil.copyfile(file, target / file.name)


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / "state.json"
    try:
        content: dict[str, Any] = safe.read_json(file)
        if newer := safe.explain_newer_format(file, content):
            raise ConfigError(f"{newer}.")
        if fault := safe.find_mismatch(content, STATE_SCHEMA):
            raise safe.Unsafe(fault)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}). {CURE}") from error
    return content


def find_newest(files: RunFolder, say: Callable[[str], None]) -> Path | None:
    """Return the folder of the newest whole checkpoint, or ``None``; tell ``say`` of each damaged one.

    Raises ``ConfigError`` if one has a later format: the version that wrote it can resume from it.
    """
    for step in reversed(files.steps()):
        folder = files.checkpoint(step)
        for name in (manifest.NAME, "state.json"):
            if newer := _explain_newer_format(folder / name):
                raise ConfigError(f"{newer}.")
        found = manifest.faults(folder)
        if not found:
            return folder
        say(f"Checkpoint {folder.name} is skipped: {'; '.join(found)}.")
    return None


def _explain_newer_format(file: Path) -> str:
    try:
        return safe.explain_newer_format(file, safe.read_json(file))
    except (OSError, ValueError):
        return ""  # a file that cannot be read has no format


def prune(files: RunFolder, keep: int | None, newest: int) -> None:
    """Remove old checkpoints: keep the last ``keep`` of those up to step ``newest``; ``None`` keeps all.

    The checkpoint of ``newest`` is whole. Those of later steps are removed, too: the run resumed from an
    earlier one, so they were damaged. The checkpoint that ``failure.json`` names is always kept.
    """
    if not keep:
        return
    steps = files.steps()
    kept = [step for step in steps if step <= newest][-keep:]
    for step in steps:
        if step not in kept and step != files.failed_at():
            shutil.rmtree(files.checkpoint(step))
