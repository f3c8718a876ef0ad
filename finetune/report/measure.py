"""Describe a number of ``result.json`` by which runs are compared."""

from __future__ import annotations

from dataclasses import dataclass

from .metric import show_bytes

SPLIT_WORDS = {
    "test": "",
    "val": "validation ",
    "base": "untrained ",
    "retention": "retention ",
    "base_retention": "untrained retention ",
}


@dataclass(frozen=True)
class Measure:
    """A number of ``result.json``, given by its dotted name.

    Examples: ``test.accuracy``, ``retention.loss``, ``cost.peak_memory_bytes``, ``stored_bytes``.
    """

    name: str

    @property
    def split(self) -> str:
        """The part of the name before the last dot, or the empty string."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The part of the name after the last dot."""
        return self.name.rpartition(".")[2]

    @property
    def words(self) -> str:
        """The name as people read it, such as ``validation loss``."""
        return SPLIT_WORDS.get(self.split, "") + self.key.replace("_", " ")

    @property
    def higher_is_better(self) -> bool:
        """True for accuracies only: every other number of a result is a loss or a cost."""
        return self.key == "accuracy"

    @property
    def percent(self) -> bool:
        """True for accuracies, which are shown in percent."""
        return self.key == "accuracy"

    def show(self, value: float | None) -> str:
        """Return ``value`` as text with the digits that are worth reading, without a percent sign."""
        if value is None:
            return "-"
        if self.percent:
            return f"{100 * value:.2f}"
        if self.key.endswith("bytes"):
            return show_bytes(value)
        if float(value).is_integer() and abs(value) >= 1000:
            return f"{value:,.0f}"
        if "seconds" in self.key:
            return f"{value:.4g}"
        return f"{value:.4f}"
