"""A session on disk, complete enough to go on to the bit: tensors as safetensors, the rest as JSON; no pickle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..system import safe
from ..system.disk import writing
from . import manifest
from .delta import read
from .run_folder import RunFolder, write_json_atomic

TENSORS = ("states", "optimizer", "rng")
NONE = type(None)
METRICS = ({str: object}, NONE)
WATCH = {
    "phase": int | None, "seen": int, "first": float | None, "losses": [float], "norms": [float], "dead": int, "still": ({str: int}, NONE),
    "said": [str], "warnings": [str],
}  # fmt: skip
MEMORY = {
    "batch_size": int,
    "micro_batch_size": int | None,
    "out_of_memory": [{"step": int, "from": int, "to": int}],
}
EXTRA = {  # what a run keeps beside its session
    "best": ([str | float], NONE), "best_step": int | None, "best_stage": ([int], NONE), "val": METRICS, "base": METRICS, "base_retention": METRICS,
    "seconds": [float], "spent?": float, "over?": bool, "watch?": WATCH, "memory?": (MEMORY, NONE), "threads?": int,
    "config?": {}, "processes?": int,
}  # fmt: skip


class Saved(Protocol):
    """A session, or one that was kept."""

    def state_dict(self) -> dict[str, Any]: ...


class Loadable(Protocol):
    """A session that can go on from a saved state."""

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


def save(folder: Path, session: Saved, extra: dict[str, Any], best: Path | None = None) -> None:
    """Write ``state.safetensors``, ``state.json`` and their manifest; the folder appears whole or not at all.

    ``best``: the folder of the best change so far, which goes along: a later one may take its place there before the run is broken off.
    """
    saved = session.state_dict()
    rest = {key: value for key, value in saved.items() if key not in TENSORS}
    folder.parent.mkdir(exist_ok=True)
    with manifest.sealing(folder) as temporary:
        with writing(temporary / "state.safetensors"):
            save_file(tensors(saved), temporary / "state.safetensors")
        write_json_atomic(
            temporary / "state.json",
            {**manifest.HEADER, **rest, "groups": saved["optimizer"]["param_groups"], "extra": extra},
        )
        _along(best, temporary)


def tensors(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a session's state by name, on the CPU."""
    found: dict[str, Tensor] = {f"states/{k}": v for k, v in saved["states"].items()} | {
        f"rng/{k}": v for k, v in saved["rng"].items()
    }
    found |= {
        f"optimizer/{i}/{k}": v for i, entry in saved["optimizer"]["state"].items() for k, v in entry.items()
    }
    return {k: v.detach().cpu().contiguous() for k, v in found.items()}


def load(folder: Path, session: Loadable) -> dict[str, Any]:
    """Put a saved state into ``session``; returns the ``extra`` it was saved with. Raises ``ConfigError`` for a damaged file or a later format."""
    content = _about(folder)
    manifest.check(folder)
    stored = read(folder / "state.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"states": {}, "rng": {}, "optimizer": {}}
    try:
        for name, tensor in stored.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            place, _, key = name.partition("/")
            entries.setdefault(int(place), {})[key] = tensor
        optimizer = {"state": entries, "param_groups": content["groups"]}
        session.load_state_dict(
            {**content, "states": parts["states"], "rng": parts["rng"], "optimizer": optimizer}
        )
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{folder} is no state of this method and model ({why}). Go on from another checkpoint, or train again."
        ) from error
    extra: dict[str, Any] = content["extra"]
    return extra


def progress(folder: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """What ``train`` kept beside its session, as it was. Raises ``ConfigError`` where ``extra`` is nothing of the kind."""
    try:
        memory = extra.get("memory") or {}
        if fault := safe.differs(extra, EXTRA):
            raise safe.Unsafe(fault)
        counts = {**extra, **memory}
        for key, most in (
            ("threads", 1024),
            ("processes", 2**20),
            ("batch_size", 2**31),
            ("micro_batch_size", 2**31),
        ):
            if not 1 <= (counts.get(key) or 1) <= most:
                raise safe.Unsafe(f"{key} is {counts[key]}")
        if len({extra[key] is None for key in ("best", "best_step", "best_stage")}) > 1:
            raise safe.Unsafe("it has a best step and has none")
        best = extra["best"] and [float(number) for number in extra["best"]]
    except ValueError as error:
        raise ConfigError(
            f"{folder / 'state.json'} is no state of a run ({error}). Go on from another checkpoint, or train again."
        ) from error
    return {**extra, "best": best}


def put_back(folder: Path, delta: Path) -> None:
    """Make the best change that went along with a checkpoint the stored one again."""
    if (
        folder / "delta.json"
    ).is_file():  # older checkpoints have none, nor those before the first validation
        with manifest.sealing(delta) as temporary:
            _along(folder, temporary)


def _along(source: Path | None, target: Path) -> None:
    """Copy the files of a change. A second name for them would save the room, and share the damage."""
    for file in sorted(source.glob("delta.*")) if source else ():
        shutil.copyfile(file, target / file.name)


def _about(folder: Path) -> dict[str, Any]:
    file = folder / "state.json"
    try:
        content: dict[str, Any] = safe.read_json(file)
        if newer := safe.too_new(file, content):
            raise ConfigError(f"{newer}.")
        if fault := safe.differs(
            content, {"phase": int, "number": int, "groups": [{}], "scaler": object, "extra": {}}
        ):
            raise safe.Unsafe(fault)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}). Go on from another checkpoint, or train again."
        ) from error
    return content


def newest(files: RunFolder, say: Callable[[str], None]) -> Path | None:
    """The whole checkpoint of the latest step in a run's folder; ``say`` hears of each that is torn or altered, and so skipped.

    Raises ``ConfigError`` for one of a later format: a version that knows it can go on from there.
    """
    for step in reversed(files.steps()):
        folder = files.checkpoint(step)
        if newer := _too_new(folder / manifest.NAME) or _too_new(folder / "state.json"):
            raise ConfigError(f"{newer}.")
        found = manifest.faults(folder)
        if not found:
            return folder
        say(f"Checkpoint {folder.name} is skipped: {'; '.join(found)}.")
    return None


def _too_new(file: Path) -> str:
    try:
        return safe.too_new(file, safe.read_json(file))
    except (OSError, ValueError):
        return ""  # no format at all


def prune(files: RunFolder, keep: int | None, newest: int) -> None:
    """Of the checkpoints up to that of step ``newest``, which is whole, leave the last ``keep`` (``None``: all) and that of ``failure.json``.

    Later ones go, too: the run went on from before them, so they were not whole.
    """
    steps = files.steps()
    before = [step for step in steps if step <= newest]
    gone = [step for step in steps if step > newest] + before[:-keep] if keep else []
    for step in gone:
        if step != files.failed_at():
            shutil.rmtree(files.checkpoint(step))
