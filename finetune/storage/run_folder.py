"""The files of a run: where they lie and how they are written. Imports no torch.

Every file but the two that grow (``metrics.jsonl``, ``log.txt``) appears whole or not at all. The contract is docs/run-folder.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..config import later, plugins
from ..config.settings import Config, decides
from ..errors import ConfigError
from ..system import safe

UMASK = os.umask(0)  # which can only be read by setting it
os.umask(UMASK)
STAMP = {"format": safe.FORMAT, "finetune": __version__}  # in front of a JSON file: what is needed to read it
TRIALS = "trials"  # the folder in that of a sweep which holds the runs that settings were tuned by: ``name=NAME/trials``
CLASSIFICATION = {"id": "string", "label": "int64", "prediction": "int64", "score": "float64"}
LANGUAGE = {"loss": "float64", "bytes": "int64"}
NUMBERS = (type(None), {str: float | None})
MOVABLE = (  # where things lie and what computes: free in a run that is only read
    "model.path", "model.download", "model.revision", "dataset.path", "train.device", "train.threads", "train.workers", "train.eval_batch_size",
)  # fmt: skip
RESULT = {  # what readers rely on; a failed run has less
    "status": str, "error?": str | None, "method?": str, "model?": str, "dataset?": str, "seed?": int, "steps?": int, "best_step?": int | None,
    "metrics?": {str: NUMBERS}, "params?": (type(None), {"trained": int, "adapted?": int, "total?": int}), "stored_bytes?": int | None,
    "cost?": (
        type(None),
        {"step_seconds_median?": float | None, "train_seconds?": float, "peak_memory_bytes?": int, "peak_memory_kind?": str},
    ),
    "versions?": {str: str}, "git_commit?": str | None, "device?": str | None, "config_hash?": str, "group_hash?": str,
    "suspect?": [str], "warnings?": [str],
}  # fmt: skip


def plain(value: Any) -> Any:
    """``value`` as strict JSON can hold it: scalars of numpy and torch become Python's, NaN and infinities ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: Path) -> None:
    """Make what ``path`` holds survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name for a file or folder to write, which takes the place of ``path`` when the block ends without an error."""
    temporary, before = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _discard(temporary)
    try:
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            if (
                written.is_file() and stat.S_IMODE(written.stat().st_mode) == 0o600
            ):  # as safetensors makes them, whatever the user's umask
                written.chmod(0o666 & ~UMASK)
            _sync(written)
        if path.is_dir():  # nothing can be renamed over a folder that holds files; whoever is killed here leaves it to lock.py
            path.replace(before)
        temporary.replace(path)
        _sync(path.parent)
        _discard(before)
    finally:
        if before.exists() and not path.exists():
            before.replace(path)
        _discard(temporary)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write strict, indented JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def write_yaml(path: Path, value: Mapping[str, Any], comments: Sequence[str] = ()) -> None:
    """Write a mapping of plain values as YAML atomically, in its own order.

    The first line says the format of the folder; ``comments`` are the lines after it.
    """
    with replacing(path) as temporary:
        text = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
        lines = [f"# format {safe.FORMAT}, finetune {__version__}", *comments, text]
        temporary.write_text("\n".join(lines), encoding="utf-8")


def write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row per test example as Parquet: id, label, prediction, score; or id, loss, bytes for a language model.

    The columns are those of the first row, in the contract's types. Raises ``ValueError`` for no rows, other columns or unequal rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {**CLASSIFICATION, **LANGUAGE}
    columns = [name for name in known if rows and name in rows[0]]
    if not columns or any(set(row) != set(columns) for row in rows):
        raise ValueError(
            f"predictions need at least one row, and every row the same of the columns {', '.join(known)}"
        )
    table = pa.table(
        {name: pa.array([plain(row[name]) for row in rows], known[name]) for name in columns},
        metadata={"format": str(safe.FORMAT)},
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


class MetricsFile:
    """Appends one JSON object a line, each with its ``step``; open only while it writes.

    A run that resumes after ``start`` steps drops the lines of later steps and a torn last one; one that starts anew drops all.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        there = (
            path.read_text(encoding="utf-8", errors="replace").splitlines() if start and path.exists() else []
        )
        kept = [line for line in there if _step(line) <= start]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line."""
        line = json.dumps(plain({"step": step, **metrics}), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _step(line: str) -> float:
    """The step of a line of metrics; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


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
        if fault := safe.differs(result, RESULT):
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
                _sync(file)

    def open_or_check(self, config: Config) -> None:
        """Make the folder and freeze ``config`` in it. Raises ``ConfigError``, with nothing written, if another run's files are there."""
        self.check(config)
        if self.finished:
            return
        try:
            write_yaml(self.config, config.as_dict(), plugins.comments(config))
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
