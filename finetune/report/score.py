"""Any number of a result that runs can be compared by."""

from __future__ import annotations

from dataclasses import dataclass

from .metric import show_bytes

SPLITS = {
    "test": "",
    "val": "validation ",
    "base": "untrained ",
    "retention": "retention ",
    "base_retention": "untrained retention ",
}


@dataclass(frozen=True)
class Score:
    """A number of ``result.json`` by its dotted name: ``test.accuracy``, ``retention.loss``, ``cost.peak_memory_bytes``, ``stored_bytes``."""

    name: str

    @property
    def split(self) -> str:
        """What stands in front of the last dot."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """What stands behind the last dot."""
        return self.name.rpartition(".")[2]

    @property
    def words(self) -> str:
        """For people."""
        return SPLITS.get(self.split, "") + self.key.replace("_", " ")

    @property
    def higher_is_better(self) -> bool:
        """Of accuracies only; everything else that a result holds is a loss or a cost."""
        return self.key == "accuracy"

    @property
    def percent(self) -> bool:
        """Whether it is a share, read in percent."""
        return self.key == "accuracy"

    def show(self, value: float | None) -> str:
        """``value`` to the precision that is worth reading, without the sign of percent."""
        if value is None:
            return "-"
        if self.percent:
            return f"{100 * value:.2f}"
        if self.key.endswith("bytes"):
            return show_bytes(value)
        return (
            f"{value:,.0f}"
            if float(value).is_integer() and abs(value) >= 1000
            else f"{value:.4g}"
            if "seconds" in self.key
            else f"{value:.4f}"
        )
