"""``check_analysis`` passes an analysis without fault, and each check catches the fault planted for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from finetune.core.analysis import Analysis, Subject, Table
from finetune.testing.analyses import ANALYSIS_CHECKS, AnalysisTrial, check_analysis, train_small

from ..support.tiny_model import TINY


@dataclass(frozen=True)
class Count(Analysis):
    """Count the parameters of the model, and do what ``ACTIONS`` says for ``fault`` on the way."""

    name: ClassVar[str] = "count"
    fault: str = "none"

    def __call__(self, *subjects: Subject) -> Table:
        (subject,) = subjects
        found = ACTIONS[self.fault](subject)
        if isinstance(found, Table):
            return found
        total = sum(parameter.numel() for parameter in subject.open().session.model.parameters())
        return Table([{"what": "parameters", "total": total}], {"total": total, "fault": found})


def write_file(subject: Subject) -> None:
    (subject.folder / "note.txt").write_text("mine")


def change_config(subject: Subject) -> None:
    with (subject.folder / "config.yaml").open("a") as file:
        file.write("# read\n")


def change_delta(subject: Subject) -> None:
    (subject.folder / "delta" / "more.bin").write_bytes(b"1")


def raise_key_error(subject: Subject) -> None:
    raise KeyError("head")


ACTIONS: dict[str, Callable[[Subject], Any]] = {
    "none": lambda subject: 0,
    "random": lambda subject: float(torch.rand(())),
    "tensor": lambda subject: torch.ones(1),
    "nan": lambda subject: math.nan,
    "list": lambda subject: [1],
    "columns": lambda subject: Table([{"a": 1}, {"b": 1}], {}),
    "file": write_file,
    "config": change_config,
    "delta": change_delta,
    "error": raise_key_error,
}
FAULTS = [
    ("deterministic", "random", "other numbers"),
    ("plain", "tensor", "strict JSON"),
    ("plain", "nan", "strict JSON"),
    ("plain", "list", "summary.fault is no single value"),
    ("plain", "columns", "other columns"),
    ("untouched", "file", "changed note.txt"),
    ("untouched", "config", "changed config.yaml"),
    ("untouched", "delta", "changed delta/more.bin"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"), "method=bitfit", *TINY)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_an_analysis_without_fault_passes(run: Path) -> None:
    check_analysis(Count(), [run])


@pytest.mark.parametrize(("check", "fault", "words"), FAULTS)
def test_each_planted_fault_is_caught(run: Path, check: str, fault: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        ANALYSIS_CHECKS[check](AnalysisTrial(Count(fault), [run]))


def test_what_is_not_refused_or_not_by_a_message_is_caught(run: Path) -> None:
    refuses = ANALYSIS_CHECKS["refuses"]
    refuses(AnalysisTrial(Count(), [run]))
    with pytest.raises(AssertionError, match="not refused"):
        refuses(AnalysisTrial(Count(), [run], [[run]]))
    with pytest.raises(AssertionError, match="KeyError, and not a message"):
        refuses(AnalysisTrial(Count("error"), [run], [[run]]))
