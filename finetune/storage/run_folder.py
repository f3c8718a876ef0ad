"""Name the files of a run's folder, read its result, and compare its frozen configuration. Imports no torch.

The contract is docs/run-folder.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from pathlib import Path
from typing import Any

import yaml

from ..config import later, plugins
from ..config.settings import Config, decides
from ..errors import ConfigError
from ..system import safe
from .atomic import sync_to_disk, write_yaml_atomic
from .result import RESULT_SCHEMA

TRIALS = "trials"  # the folder in that of a sweep which holds the runs that settings were tuned by: ``name=NAME/trials``
MOVABLE = (  # where things lie and what computes: free in a run that is only read
    "model.path", "model.download", "model.revision", "dataset.path", "train.device", "train.threads", "train.workers", "train.eval_batch_size",
)  # fmt: skip


def _folder_name(key: str, value: str) -> str:
    """``value`` if it can be one folder's name; raises ``ConfigError`` otherwise."""
    if (
        not value
        or value.startswith(".")
        or set(value) & set("/\\")
        or not value.isprintable()
        or len(value.encode()) > 200
    ):
        raise ConfigError(
            f"{key}={value!r} cannot name a folder. Use a shorter one without '/' or '\\' and without a dot in front."
        )
    return value


def run_folder(config: Config) -> Path:
    """``outputs/<name>/<run>``, relative to the working directory; by default today's date and a name made of the content."""
    name = config.name or datetime.date.today().isoformat()
    run = (
        config.run
        or f"{config.method.name}-{config.model.name}-{config.dataset.name}-s{config.seed}-{config.hash()}"
    )
    sweep = name.removesuffix(f"/{TRIALS}")
    place = Path("outputs") / _folder_name("name", sweep)
    return (place / TRIALS if sweep != name else place) / _folder_name("run", run)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of a nested mapping."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, item in tree.items()
        for key, value in _leaves(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _compared(tree: Any, free: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings by which two configurations are the same run, by dotted key; later ones are entered."""
    compared = {}
    for key, value in _leaves(later.enter(tree) if isinstance(tree, dict) else tree).items():
        if decides(key) and key not in free:
            compared[key] = value
    return compared


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of one run's files; making it touches nothing."""

    path: Path

    @property
    def config(self) -> Path:
        """The frozen configuration."""
        return self.path / "config.yaml"

    @property
    def result(self) -> Path:
        """What the run found."""
        return self.path / "result.json"

    @property
    def metrics(self) -> Path:
        """One line of numbers per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
        """One row per test example."""
        return self.path / "predictions.parquet"

    @property
    def delta(self) -> Path:
        """The folder of the trained change."""
        return self.path / "delta"

    @property
    def log(self) -> Path:
        """What was said."""
        return self.path / "log.txt"

    def checkpoint(self, step: int) -> Path:
        """The folder of the state after ``step`` steps."""
        return self.path / "checkpoints" / f"step-{step}"

    @property
    def finished(self) -> bool:
        """Whether a result of a finished run lies here."""
        return self.result.is_file() and self.read_result().get("status") == "finished"

    def read_result(self) -> dict[str, Any]:
        """The content of ``result.json``; raises ``ConfigError`` when it is missing, unreadable or of a later format."""
        try:
            result: dict[str, Any] = safe.read_json(self.result)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.result} cannot be read ({error}). Give the folder of a run that ended."
            ) from error
        if not isinstance(result, dict):
            raise ConfigError(
                f"{self.result} does not hold a run's result. Give the folder of a run that ended."
            )
        if newer := safe.too_new(self.result, result):
            raise ConfigError(f"{newer}.")
        if fault := safe.differs(result, RESULT_SCHEMA):
            raise ConfigError(
                f"{self.result} is not as a run wrote it: {fault}. Train again in another folder."
            )
        return result

    def steps(self) -> list[int]:
        """The steps that a checkpoint is named by, in ascending order, whole or not."""
        found = (
            re.fullmatch(r"step-(0|[1-9]\d{0,17})", path.name)
            for path in (self.path / "checkpoints").glob("step-*")
        )
        return sorted(int(match[1]) for match in found if match)

    def failed_at(self) -> int | None:
        """The step whose checkpoint ``failure.json`` names."""
        try:
            return int(
                safe.read_json(self.path / "failure.json", {"checkpoint": str})["checkpoint"].removeprefix(
                    "step-"
                )
            )
        except (OSError, ValueError):
            return None

    def sync(self) -> None:
        """Make the lines written so far survive a power cut, as a checkpoint does."""
        for file in (self.metrics, self.log):
            if file.exists():
                sync_to_disk(file)

    def open_or_check(self, config: Config) -> None:
        """Make the folder and freeze ``config`` in it. Raises ``ConfigError``, with nothing written, if another run's files are there."""
        self.check(config)
        if self.finished:
            return
        try:
            write_yaml_atomic(self.config, config.as_dict(), plugins.comments(config))
        except OSError as error:
            raise ConfigError(
                f"The run folder {self.path} cannot be written: {error.strerror}. Start from a folder with room that you may write to."
            ) from error

    def check(self, config: Config) -> None:
        """Raise ``ConfigError`` if something else than this very run lies here."""
        cure = "Choose another run= or name=, or remove it."
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, where the run's folder should be. {cure}")
        safe.check_links(self.path)
        if self.config.exists():
            if newer := safe.too_new(self.config, safe.first_line(self.config)):
                raise ConfigError(f"{newer}.")
            differ = self.differences(config.as_dict())
            if differ:
                raise ConfigError(f"The run folder {self.path} holds another run: {differ}. {cure}")
        elif self.path.exists() and any(
            not file.name.startswith(".") and file != self.log for file in self.path.iterdir()
        ):
            raise ConfigError(f"The folder {self.path} holds files but no config.yaml of a run. {cure}")

    def check_unaltered(self, kept: dict[str, Any], beside: Path, free: tuple[str, ...] = ()) -> None:
        """Raise ``ConfigError`` where the frozen configuration is not ``kept``, which went along with what lies at ``beside``."""
        if differ := self.differences(kept, free):
            raise ConfigError(
                f"{self.config} is not what {beside} was trained with: {differ}. Put it back as it was; `finetune train` starts other runs."
            )

    def differences(self, ours: dict[str, Any], free: tuple[str, ...] = ()) -> str:
        """In words, the first five settings in which the frozen configuration differs; empty when it is of the same run. ``free``: may differ."""
        try:
            theirs = safe.read_yaml(self.config)
        except (OSError, ValueError, yaml.YAMLError):
            return "its config.yaml cannot be read"
        there, here = _compared(theirs, free), _compared(ours, free)
        keys = [key for key in {**there, **here} if there.get(key, "absent") != here.get(key, "absent")]
        shown = [
            f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
            for key in keys[:5]
        ]
        return ", ".join(shown) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
