"""Checks that every analysis passes. Each raises ``AssertionError`` with the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.analyze import FOLDER, Analyzed, analyze
from ..config.load import load
from ..core.analysis import Analysis
from ..errors import ConfigError
from ..system import random_state, safe
from ..training.run import train

SMALL = (
    "train.steps=4",
    "train.batch_size=8",
    "train.eval_every=null",
    "train.device=cpu",
    "train.threads=1",
    "dataset.retention_images=0",
)


def train_small(folder: Path, *settings: str) -> Path:
    """Train a run of four steps on the built-in model and the digits in ``folder``, and return the folder.

    ``settings``: more words of the command line, for example ``method=lora``.
    """
    train(load([*SMALL, *settings]), folder, lambda line: None, lambda done, total, words: None)
    return folder


@dataclass(frozen=True)
class AnalysisTrial:
    """An analysis to check, finished runs that it takes, and tuples of runs that it must refuse."""

    analysis: Analysis
    runs: Sequence[Path]
    wrong: Sequence[Sequence[Path]] = ()

    def analyze(self) -> Analyzed:
        """Analyze the runs."""
        return analyze(self.analysis, self.runs)


def check_deterministic(trial: AnalysisTrial) -> None:
    """The same runs give the same numbers, to the bit, whatever random numbers were drawn before."""
    found = []
    for seed in (0, 1):
        random_state.seed(seed)
        found.append(json.dumps(trial.analyze().result))
    assert found[0] == found[1], "the same runs give other numbers when they are analyzed again"


def check_plain(trial: AnalysisTrial) -> None:
    """The table holds plain finite values, its rows have the same columns, and the file gives it back."""
    analyzed = trial.analyze()
    table = analyzed.table.as_json()
    try:
        text = json.dumps(table, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"the table cannot be written as strict JSON: {error}") from error
    for row in table["rows"]:
        assert list(row) == table["columns"], f"a row has other columns than the first: {list(row)}"
    for name, value in table["summary"].items():
        assert not isinstance(value, list | dict), f"summary.{name} is no single value"
    stored = safe.read_json(analyzed.store())
    wrong = [key for key, value in json.loads(text).items() if stored[key] != value]
    assert not wrong, f"the stored file has other values: {wrong}"


def check_untouched(trial: AnalysisTrial) -> None:
    """Nothing in the folders of the runs changes but the folder of results."""
    before = [_digest_files(run) for run in trial.runs]
    trial.analyze().store()
    for run, expected in zip(trial.runs, before, strict=True):
        found = _digest_files(run)
        changed = [str(file) for file in {**expected, **found} if expected.get(file) != found.get(file)]
        assert not changed, f"{run}: the analysis changed {', '.join(changed)}"


def _digest_files(run: Path) -> dict[Path, str]:
    """Return the SHA-256 of every file of a run but the results of analyses."""
    found = {}
    for file in sorted(run.rglob("*")):
        name = file.relative_to(run)
        if file.is_file() and name.parts[0] != FOLDER:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def check_refuses(trial: AnalysisTrial) -> None:
    """Too few and too many runs, a folder that is no run, and ``wrong`` runs are refused in one message."""
    no_run = trial.runs[0] / "delta" / "none"
    others = trial.runs[1:]
    for runs in ((), (*trial.runs, trial.runs[0]), (no_run, *others), *trial.wrong):
        shown = " ".join(map(str, runs)) or "no run"
        faults = _find_faults(trial.analysis, runs, shown)
        assert faults, f"{shown}: not refused"
        assert len(faults) == 1, f"{shown}: refused by {len(faults)} messages: {faults}"


def _find_faults(analysis: Analysis, runs: Sequence[Path], shown: str) -> tuple[str, ...]:
    """Return the messages by which ``analysis`` refuses ``runs``; none if it takes them."""
    try:
        analyze(analysis, runs)
    except ConfigError as error:
        return error.faults
    except Exception as error:
        raise AssertionError(f"{shown}: {type(error).__name__}, and not a message: {error}") from error
    return ()


ANALYSIS_CHECKS: dict[str, Callable[[AnalysisTrial], None]] = {
    "deterministic": check_deterministic,
    "plain": check_plain,
    "untouched": check_untouched,
    "refuses": check_refuses,
}


def check_analysis(analysis: Analysis, runs: Sequence[Path], wrong: Sequence[Sequence[Path]] = ()) -> None:
    """Run every check of ``ANALYSIS_CHECKS`` on finished ``runs``. ``wrong``: runs that must be refused."""
    trial = AnalysisTrial(analysis, runs, wrong)
    for run_check in ANALYSIS_CHECKS.values():
        run_check(trial)
