"""The interface of an analysis, which measures runs and returns a table, summary numbers and plots.

An analysis only reads; ``finetune analyze`` stores its result. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Need = Literal["merge"]


@dataclass(frozen=True)
class Subject:
    """A run that is analyzed.

    ``path``: the run, or one of its checkpoints, as the user named it. ``folder``: the folder of the run.
    ``step``: the optimizer step whose state is stored there.
    ``open``: rebuilds the run from its base and its stored change, and returns its ``Setup``: model, data and
    session. Each call reads the model from disk again. After a further call, do not use an earlier setup.
    """

    path: Path
    folder: Path
    step: int
    open: Callable[[], Any]


@dataclass(frozen=True)
class HeatMap:
    """A grid of numbers, colored from 0 up. ``values``: one sequence for each row; NaN leaves a blank."""

    name: str
    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Curves:
    """A plot of one or more curves over the numbers ``x``. ``from_zero``: the vertical axis starts at 0."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    curves: Mapping[str, Sequence[float]]
    from_zero: bool = False


Plot = HeatMap | Curves


@dataclass(frozen=True)
class Table:
    """What an analysis found. All values are plain: text, numbers, booleans, None, lists and mappings.

    ``rows``: mappings with the same keys, the columns, in the same order. ``summary``: the numbers that
    describe the whole. ``details``: what does not fit into rows. ``notes``: sentences for the reader.
    """

    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    plots: Sequence[Plot] = ()

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows[0]) if self.rows else []

    def as_json(self) -> dict[str, Any]:
        """Return the content of the stored file; a plot is stored as the numbers that it draws."""
        return {
            "summary": dict(self.summary),
            "columns": self.columns,
            "rows": [dict(row) for row in self.rows],
            "details": dict(self.details),
            "notes": list(self.notes),
            "plots": [asdict(plot) for plot in self.plots],
        }


@dataclass(frozen=True)
class Analysis:
    """Base of all analyses. Fields are options; class variables are facts that checks rely on.

    ``runs``: how many runs are analyzed together, 1 or 2.
    ``needs``: ``merge`` if only runs whose change can be merged into weights can be analyzed.

    An analysis must give the same numbers to the bit for the same subjects, and must not change anything in
    the folder of a run.
    """

    KIND: ClassVar[str] = "analysis"
    name: ClassVar[str]
    runs: ClassVar[int] = 1
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, *subjects: Subject) -> Table:
        """Analyze ``runs`` subjects. Raises ``ConfigError`` for subjects that it cannot analyze."""
        raise NotImplementedError
