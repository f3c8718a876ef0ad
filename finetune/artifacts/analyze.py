"""Analyze finished runs: open them, and store what the analysis found in the folder of the first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config.load import load
from ..core.analysis import Analysis, Subject, Table
from ..errors import ConfigError
from ..storage.atomic import STAMP, to_json_value, write_json_atomic
from ..storage.delta import read_description
from .reopen import rebuild, run_of

FOLDER = "analysis"
LONGEST = 120  # characters of a run's name in the name of a file


@dataclass(frozen=True)
class Analyzed:
    """What an analysis found.

    ``result``: the content of the stored file, plain values. ``folder``: where results of the subjects are
    stored: ``RUN/analysis``, and for a checkpoint ``RUN/analysis/step-N``. ``name``: of the stored file and
    of the folder of its plots; it has the names of the analysis and of the second run.
    """

    name: str
    subjects: tuple[Subject, ...]
    table: Table
    result: dict[str, Any]
    folder: Path

    def store(self) -> Path:
        """Write the result as ``NAME.json``, in place of an earlier one; return the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self.name}.json"
        write_json_atomic(file, {**STAMP, **self.result})
        return file


def analyze(analysis: Analysis, paths: Sequence[Path]) -> Analyzed:
    """Analyze the runs at ``paths``. Writes nothing.

    Raises ``ConfigError`` if their number is wrong, or if one is no run or cannot be analyzed.
    """
    subjects = open_subjects(analysis, paths)
    table = analysis(*subjects)
    result = {
        "analysis": analysis.name,
        "options": asdict(analysis),
        "subjects": [{"run": str(subject.path), "step": subject.step} for subject in subjects],
        **table.as_json(),
    }
    name = ".".join([analysis.name, *(_name_run(other) for other in subjects[1:])])
    return Analyzed(name, subjects, table, to_json_value(result), _place_of(subjects[0], FOLDER))


def _name_run(subject: Subject) -> str:
    """Return a name for a run, or for its checkpoint, that serves as a part of a file's name."""
    folder = subject.folder.resolve()
    name = f"{folder.parent.name}.{folder.name}"
    _, state = run_of(subject.path)
    if state:
        name += f".{state.name}"
    if len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def open_subjects(analysis: Analysis, paths: Sequence[Path]) -> tuple[Subject, ...]:
    """Return the runs at ``paths`` for ``analysis``. Raises ``ConfigError`` with every fault."""
    named = f"what={analysis.name}"
    if len(paths) != analysis.runs:
        wanted = "one run" if analysis.runs == 1 else f"{analysis.runs} runs"
        usage = " ".join("RUN" if analysis.runs == 1 else f"RUN{i + 1}" for i in range(analysis.runs))
        given = f"not {len(paths)} ({', '.join(map(str, paths))})" if paths else "and none is given"
        raise ConfigError(f"{named} takes {wanted}, {given}. Write: finetune analyze {named} {usage}.")
    subjects: list[Subject] = []
    faults: list[str] = []
    for path in paths:
        try:
            subjects.append(_open_subject(analysis, path))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(*dict.fromkeys(faults))  # the same run may be given twice
    return tuple(subjects)


def find_run_faults(paths: Sequence[Path]) -> list[str]:
    """Return a fault for each path that is no run. No run is opened."""
    faults: list[str] = []
    for path in paths:
        try:
            run_of(path)
        except ConfigError as error:
            faults += error.faults
    return list(dict.fromkeys(faults))


def _open_subject(analysis: Analysis, path: Path) -> Subject:
    """Return the run at ``path``; it is not read yet."""
    files, state = run_of(path)
    if "merge" in analysis.needs:
        method = load([], None, files.config).method
        if not method.mergeable:
            raise ConfigError(
                f"what={analysis.name} needs the merged weights of {path}, but method={method.name} cannot "
                "be merged: it changes more than weights. Name a run of another method."
            )
    step = int(state.name.removeprefix("step-")) if state else read_description(files.delta)["step"]
    return Subject(path, files.path, step, partial(rebuild, path))


def _place_of(subject: Subject, name: str) -> Path:
    """Return the folder ``name`` of a run, or in it the folder of the checkpoint that ``subject`` names."""
    folder = subject.folder / name
    _, state = run_of(subject.path)
    return folder / state.name if state else folder


def inspect(analysis: Analysis, path: Path) -> tuple[dict[str, Any], Table]:
    """Return what ``finetune inspect`` prints of a run, and the table of its ``analysis`` ``geometry``."""
    analyzed = analyze(analysis, [path])
    (subject,) = analyzed.subjects
    found = {
        "run": str(subject.folder),
        **analyzed.result["details"],
        "folder": str(_place_of(subject, "inspect")),
    }
    return found, analyzed.table
