"""Name the files of a run's folder, read its result, and keep other runs out of it. Imports no torch.

The contract is docs/run-folder.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from pathlib import Path
from typing import Any

from ..config import plugin_records
from ..config.settings import Config
from ..errors import ConfigError
from ..system import safe
from .atomic import sync_to_disk, write_yaml_atomic
from .frozen_config import describe_differences
from .result import RESULT_SCHEMA

TRIALS = "trials"  # folder of a sweep, ``name=NAME/trials``: the runs by which its settings were tuned
CHECKPOINT = re.compile(r"step-(0|[1-9]\d{0,17})")
LONGEST_NAME = 200  # bytes


def _check_name(key: str, value: str) -> str:
    """Return ``value`` if it is valid as a folder's name; raise ``ConfigError`` otherwise."""
    unsafe = not value.isprintable() or value.startswith(".") or "/" in value or "\\" in value
    if not value or unsafe or len(value.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{key}={value!r} cannot name a folder. "
            "Use a shorter one without '/' or '\\' and without a dot in front."
        )
    return value


def run_folder(config: Config) -> Path:
    """Return ``outputs/<name>/<run>``, relative to the working directory.

    ``<name>`` is today's date by default, and ``<run>`` is made of the configuration. Raises ``ConfigError``
    where ``name`` or ``run`` cannot name a folder.
    """
    name, run = config.name or datetime.date.today().isoformat(), config.run
    if not run:
        parts = (config.method.name, config.model.name, config.dataset.name, f"s{config.seed}")
        run = "-".join((*parts, config.hash()))
    sweep = name.removesuffix(f"/{TRIALS}")
    place = Path("outputs") / _check_name("name", sweep)
    if sweep != name:
        place /= TRIALS
    return place / _check_name("run", run)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of the run in the folder ``path``. Making an instance touches no file."""

    path: Path

    @property
    def config(self) -> Path:
        """The frozen configuration."""
        return self.path / "config.yaml"

    @property
    def result(self) -> Path:
        """The result, there once the run has ended."""
        return self.path / "result.json"

    @property
    def metrics(self) -> Path:
        """The numbers of each logged step, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
        """The answer to each test example, one row each."""
        return self.path / "predictions.parquet"

    @property
    def delta(self) -> Path:
        """The folder of the trained change."""
        return self.path / "delta"

    @property
    def log(self) -> Path:
        """The messages of the run, with times."""
        return self.path / "log.txt"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the state after ``step`` steps."""
        return self.path / "checkpoints" / f"step-{step}"

    @property
    def finished(self) -> bool:
        """Whether the folder holds the result of a finished run."""
        return self.result.is_file() and self.read_result().get("status") == "finished"

    def read_result(self) -> dict[str, Any]:
        """Return the content of ``result.json``.

        Raises ``ConfigError`` if it is missing, unreadable or of a later format.
        """
        cure = "Give the folder of a run that ended."
        try:
            result: dict[str, Any] = safe.read_json(self.result)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.result} cannot be read ({error}). {cure}") from error
        if not isinstance(result, dict):
            raise ConfigError(f"{self.result} does not hold a run's result. {cure}")
        if newer := safe.explain_newer_format(self.result, result):
            raise ConfigError(f"{newer}.")
        if fault := safe.find_mismatch(result, RESULT_SCHEMA):
            raise ConfigError(
                f"{self.result} was not written by a run: {fault}. Train again in another folder."
            )
        return result

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, complete or not, in ascending order. Ignore other names."""
        found = []
        for path in (self.path / "checkpoints").glob("step-*"):
            if match := CHECKPOINT.fullmatch(path.name):
                found.append(int(match[1]))
        return sorted(found)

    def failed_at(self) -> int | None:
        """Return the step of the checkpoint that ``failure.json`` names; ``None`` if there is none."""
        try:
            failure = safe.read_json(self.path / "failure.json", {"checkpoint": str})
            return int(failure["checkpoint"].removeprefix("step-"))
        except (OSError, ValueError):
            return None

    def sync(self) -> None:
        """Flush the lines written so far to disk, as a checkpoint is."""
        for file in (self.metrics, self.log):
            if file.exists():
                sync_to_disk(file)

    def open_or_check(self, config: Config) -> None:
        """Make the folder and freeze ``config`` in it; a finished run is not touched.

        Warns if the run there was made with other code of a plug-in. Raises ``ConfigError``, with nothing
        written, if the files of another run are there.
        """
        self.check(config)
        plugin_records.check_file(self.config)
        if self.finished:
            return
        try:
            write_yaml_atomic(self.config, config.as_dict(), plugin_records.comments(config))
        except OSError as error:
            raise ConfigError(
                f"The run folder {self.path} cannot be written: {error.strerror}. "
                "Run the command in a folder where you may write and where there is free space."
            ) from error

    def check(self, config: Config) -> None:
        """Raise ``ConfigError`` if anything but the run of ``config`` lies in the folder."""
        cure = "Choose another run= or name=, or remove it."
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, where the run's folder should be. {cure}")
        safe.check_links(self.path)
        if self.config.exists():
            if newer := safe.explain_newer_format(self.config, safe.first_line(self.config)):
                raise ConfigError(f"{newer}.")
            if differences := describe_differences(self.config, config.as_dict()):
                raise ConfigError(f"The run folder {self.path} holds another run: {differences}. {cure}")
            return
        for file in self.path.iterdir():
            if not file.name.startswith(".") and file != self.log:
                raise ConfigError(f"The folder {self.path} holds files but no config.yaml of a run. {cure}")

    def check_unaltered(self, recorded: dict[str, Any], beside: Path, free: tuple[str, ...] = ()) -> None:
        """Raise ``ConfigError`` if the frozen configuration is not the one ``recorded`` in ``beside``.

        ``beside``: a folder of tensors. ``free``: settings that may differ.
        """
        if differences := describe_differences(self.config, recorded, free):
            raise ConfigError(
                f"{self.config} is not what {beside} was trained with: {differences}. "
                "Restore it. For other settings, start another run with `finetune train`."
            )
