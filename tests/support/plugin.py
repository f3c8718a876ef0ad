"""A plug-in with one class of every kind, as a user outside the package would write it.

The names start with "scratch", so that they differ from the names that a user adds to this checkout.
"""

from __future__ import annotations

from pathlib import Path

from finetune.registry import KINDS
from finetune.testing import new

METHOD = '''
"""Row scaling: one trained factor for each output feature."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from finetune.core.method import Reparam
from finetune.core.part import Delta
from finetune.registry import register

from ._size import ROWS


class RowFactor(Delta):
    def __init__(self, site):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(site.shape[ROWS]))

    def forward(self, weight):
        return self.s[:, None] * weight


@register("scratch_rows")
@dataclass(frozen=True)
class RowScale(Reparam):
    """Row scaling: one factor an output feature."""

    family: ClassVar[str] = "reparameterization"
    trains: ClassVar[str] = "one factor for each output feature"

    def delta(self, site):
        return RowFactor(site)
'''
PARTS = '''
"""A score, a schedule, an optimizer, a selector and a data set."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from finetune.core.optimizer import Optimizer
from finetune.core.selector import Selector
from finetune.core.sparse.schedule import Move, Schedule
from finetune.core.sparse.scores import Score
from finetune.data.digits import Digits
from finetune.registry import register


@register("scratch_smallness")
class Smallness(Score):
    """Minus |w|."""

    signed: ClassVar[bool] = True

    def __call__(self, site, method):
        return site.weight().abs_().neg_()


@register("scratch_once")
@dataclass(frozen=True)
class Once(Schedule):
    """All entries are chosen again before one step."""

    at: int = 1

    def move(self, step, total):
        return Move(redraw=True) if step == self.at else None


@register("scratch_sgd")
@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent."""

    momentum: float = 0.0

    def make(self, groups, states):
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


@register("scratch_all_parts")
@dataclass(frozen=True)
class AllParts(Selector):
    """Every part trains."""


@register("scratch_few_digits")
@dataclass(frozen=True)
class FewDigits(Digits):
    """The digits under another name."""
'''
CLASSES = {
    "method": "scratch_rows",
    "score": "scratch_smallness",
    "schedule": "scratch_once",
    "optimizer": "scratch_sgd",
    "selector": "scratch_all_parts",
    "dataset": "scratch_few_digits",
}
FROM_SKELETONS = {}  # of the kinds that the texts above do not have
for _kind in KINDS.values():
    if _kind.folders and _kind.name not in CLASSES:
        FROM_SKELETONS[_kind.name] = f"scratch_{_kind.name}"
SETTINGS = [
    "method=sparse",
    "method.score=scratch_smallness",
    "schedule=scratch_once",
    "optimizer=scratch_sgd",
    "optimizer.momentum=0.5",
    "selector=scratch_all_parts",
    "dataset=scratch_few_digits",
]


def write_plugin(folder: Path, version: str = "1.2") -> Path:
    """Write the plug-in into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (folder / "_size.py").write_text("ROWS = 0\n")
    (folder / "scratch_rows.py").write_text(METHOD)
    (folder / "parts.py").write_text(PARTS)
    (folder / "test_scratch_rows.py").write_text("raise RuntimeError('a test is not part of a plug-in')\n")
    return folder


def write_skeletons(folder: Path) -> Path:
    """Write a plug-in of the classes in ``FROM_SKELETONS`` into ``folder`` and return it."""
    folder.mkdir(parents=True)
    for kind, name in FROM_SKELETONS.items():
        new.write(kind, name, new.DEFAULT_FAMILY, folder)
    return folder
