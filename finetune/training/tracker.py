"""Send the numbers of a run to its ``metrics.jsonl`` and to W&B while it trains, from rank 0 only."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..config.settings import Config
from ..storage.atomic import STAMP, write_json_atomic
from ..storage.result import group_hash
from ..storage.rows import MetricsFile
from ..storage.run_folder import RunFolder
from ..system import safe

INIT_SECONDS = 20.0  # how long W&B may delay the start of a run when its server does not answer
FINISH_SECONDS = 60.0  # how long it may delay the end; what was not sent stays on disk for `wandb sync`
EXIT_CODES = {"finished": 0, "interrupted": 255}  # shown by W&B as finished and as killed; others as failed
ID = re.compile(r"[0-9a-z]{8,32}")
SUMMARY = (
    *("status", "error", "metrics", "params", "changed", "stored_bytes"),
    *("cost", "steps", "best_step", "device"),
)  # keys of result.json


class Tracker(Protocol):
    """What the training loop calls."""

    def log(self, step: int, **metrics: float) -> None:
        """Record numbers of one step; steps never fall."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the result (the content of ``result.json``) and close."""


class NullTracker:
    """The tracker of ``logger=none`` and of all ranks but 0: it records nothing."""

    def log(self, step: int, **metrics: float) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


class JsonLines:
    """The tracker of ``logger=jsonl``: it writes ``metrics.jsonl`` in the run folder."""

    def __init__(self, folder: RunFolder, start: int) -> None:
        self._file = MetricsFile(folder.metrics, start)

    def log(self, step: int, **metrics: float) -> None:
        """Append one line."""
        self._file.append(step, metrics)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing: every line is already written."""


class WeightsAndBiases:
    """The tracker of ``logger=wandb``: it writes ``metrics.jsonl`` and sends the same to W&B.

    The first error that W&B raises is passed to ``say``; the run continues without W&B.
    """

    def __init__(self, config: Config, folder: RunFolder, say: Callable[[str], None], start: int) -> None:
        self._lines = JsonLines(folder, start)
        self._say = say
        self._run: Any = None
        self._try("start", lambda: self._start_run(config, folder))

    def _start_run(self, config: Config, folder: RunFolder) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            **safe.PRIVATE,
        )
        wandb.setup(wandb.Settings(silent=True, host=""))
        mode: Any = os.environ.get("WANDB_MODE")
        if not mode:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        options: dict[str, Any] = {
            "id": _read_or_draw_id(folder),
            "resume": "allow",
            "project": config.logger.project,
            "name": folder.path.name,
            "group": config.logger.group or config.name,
            "job_type": config.method.name,
            "tags": [config.model.name, config.dataset.name, *config.logger.tags],
            "config": {**config.as_dict(), "config_hash": config.hash(), "group_hash": group_hash(config)},
            "dir": str(folder.path.absolute()),  # W&B's service may work in another folder
            "settings": settings,
        }
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode != "online":
                raise
            wandb.teardown()  # W&B's own process holds the id for the run that it could not start
            wandb.setup(wandb.Settings(silent=True, host=""))
            self._run = wandb.init(mode="offline", **options)
            self._say(
                f"Warning: W&B cannot be reached ({_first_line(error)}); this run is logged offline, "
                "for `wandb sync` later."
            )

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # an error of a logger must not end the run
            self._run = None
            self._say(
                f"Warning: W&B failed to {what} ({_first_line(error)}); "
                "the run continues with metrics.jsonl only."
            )

    def log(self, step: int, **metrics: float) -> None:
        """Append one line and send it."""
        self._lines.log(step, **metrics)
        if self._run:
            self._try("log", lambda: self._run.log(metrics, step=step))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Set the W&B run's summary and end it, as failed unless ``status`` is finished or interrupted."""
        if self._run:
            self._try("finish", lambda: self._end_run(summary))

    def _end_run(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(_flatten({key: summary.get(key) for key in SUMMARY}))
        self._run.finish(exit_code=EXIT_CODES.get(str(summary.get("status")), 1))


def _read_or_draw_id(folder: RunFolder) -> str:
    """Return the id of the W&B run from ``wandb.json``, drawn and stored at the first start.

    A resumed run thus continues the same W&B run.
    """
    file = folder.path / "wandb.json"
    try:
        known: str = safe.read_json(file, {"id": str})["id"]
        if ID.fullmatch(known):
            return known
    except (OSError, ValueError):
        pass  # the first start, or a file that this package did not write
    new = secrets.token_hex(6)
    write_json_atomic(file, {**STAMP, "id": new})
    return new


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under names such as ``test/accuracy``, each a column in W&B's table."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, "" if name == "metrics" else f"{name}/")
        elif value is not None:
            flat[name] = value
    return flat


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def make_tracker(config: Config, folder: RunFolder, say: Callable[[str], None], start: int = 0) -> Tracker:
    """Make the tracker that ``config.logger`` names.

    ``say`` takes its warnings. ``start``: the step that a resumed run continues from.
    """
    if config.logger.name == "none":
        return NullTracker()
    if config.logger.name == "jsonl":
        return JsonLines(folder, start)
    return WeightsAndBiases(config, folder, say, start)
