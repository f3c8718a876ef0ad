"""Where the numbers of a run go while it runs. Only the main process makes a tracker."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..config.settings import Config
from ..storage.result import group_hash
from ..storage.run_folder import STAMP, MetricsFile, RunFolder, write_json_atomic
from ..system import safe

INIT_SECONDS = 20.0  # how long a network that does not answer may hold up a run at its start
EXIT_CODES = {
    "finished": 0,
    "interrupted": 255,
}  # which W&B shows as finished and as killed; all else has failed
FINISH_SECONDS = 60.0  # and at its end; what was not sent stays on disk for `wandb sync`


class Tracker(Protocol):
    """What the loop calls."""

    def log(self, step: int, **metrics: float) -> None:
        """Record numbers of one step; steps never fall."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the result (the content of ``result.json``) and close."""


class Nowhere:
    """``logger=none``."""

    def log(self, step: int, **metrics: float) -> None:
        """Forget the numbers."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


class JsonLines:
    """``logger=jsonl``: ``metrics.jsonl`` in the run folder."""

    def __init__(self, folder: RunFolder, start: int) -> None:
        self._file = MetricsFile(folder.metrics, start)

    def log(self, step: int, **metrics: float) -> None:
        """Append one line."""
        self._file.append(step, metrics)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing: every line is already written."""


class WeightsAndBiases:
    """``logger=wandb``: ``metrics.jsonl`` and a W&B run. Whatever W&B raises is said once, and the run goes on without it."""

    def __init__(self, config: Config, folder: RunFolder, say: Callable[[str], None], start: int) -> None:
        self._lines = JsonLines(folder, start)
        self._say = say
        self._run: Any = None
        self._try("start", lambda: self._open(config, folder))

    def _open(self, config: Config, folder: RunFolder) -> None:
        import wandb

        quick = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            **safe.PRIVATE,
        )
        wandb.setup(wandb.Settings(silent=True, host=""))
        mode: Any = os.environ.get("WANDB_MODE") or (
            "online" if wandb.login(prompt=False, verify=False) else "offline"
        )
        about: dict[str, Any] = {
            "id": _id(folder),
            "resume": "allow",
            "project": config.logger.project,
            "name": folder.path.name,
            "group": config.logger.group or config.name,
            "job_type": config.method.name,
            "tags": [config.model.name, config.dataset.name, *config.logger.tags],
            "config": {**config.as_dict(), "config_hash": config.hash(), "group_hash": group_hash(config)},
            "dir": str(folder.path.absolute()),  # W&B's service may work in another folder
            "settings": quick,
        }
        try:
            self._run = wandb.init(mode=mode, **about)
        except Exception as error:
            if mode != "online":
                raise
            wandb.teardown()  # W&B's own process holds the id for the run that it could not start
            wandb.setup(wandb.Settings(silent=True, host=""))
            self._run = wandb.init(mode="offline", **about)
            self._say(
                f"Warning: W&B cannot be reached ({_brief(error)}); this run is logged offline, for `wandb sync` later."
            )

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # no fault of a logger is worth a run
            self._run = None
            self._say(
                f"Warning: W&B failed to {what} ({_brief(error)}); the run goes on with metrics.jsonl only."
            )

    def log(self, step: int, **metrics: float) -> None:
        """Append one line and send it."""
        self._lines.log(step, **metrics)
        if self._run:
            self._try("log", lambda: self._run.log(metrics, step=step))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Set the W&B run's summary and end it, as failed unless the result says ``finished``."""
        if self._run:
            self._try("finish", lambda: self._close(summary))

    def _close(self, summary: Mapping[str, Any]) -> None:
        found = {
            key: summary.get(key)
            for key in (
                "status",
                "error",
                "metrics",
                "params",
                "stored_bytes",
                "cost",
                "steps",
                "best_step",
                "device",
            )
        }
        self._run.summary.update(_flat(found))
        self._run.finish(exit_code=EXIT_CODES.get(str(summary.get("status")), 1))


def _id(folder: RunFolder) -> str:
    """The id of this run's W&B run, in ``wandb.json``: drawn once, so that a run that goes on is the same one there."""
    file = folder.path / "wandb.json"
    try:
        known = safe.read_json(file, {"id": str})["id"]
        if re.fullmatch(r"[0-9a-z]{8,32}", known):
            return str(known)
    except (OSError, ValueError):
        pass  # the first time, or not ours
    new = secrets.token_hex(6)
    write_json_atomic(file, {**STAMP, "id": new})
    return new


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values under names such as ``test/accuracy`` and ``cost/train_seconds``: one column each in W&B's table."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = (
            {f"{key}/{name}": item for name, item in _flat(value).items()}
            if isinstance(value, Mapping)
            else {key: value}
        )
        flat |= {name.removeprefix("metrics/"): item for name, item in inner.items() if item is not None}
    return flat


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def make(config: Config, folder: RunFolder, say: Callable[[str], None], start: int = 0) -> Tracker:
    """The tracker that ``config.logger`` names. ``say`` takes its warnings; ``start`` is the step that a resumed run goes on from."""
    if config.logger.name == "none":
        return Nowhere()
    return (
        JsonLines(folder, start)
        if config.logger.name == "jsonl"
        else WeightsAndBiases(config, folder, say, start)
    )
