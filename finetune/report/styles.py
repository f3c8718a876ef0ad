"""Give every series of rows a colour and a symbol, the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .schema import ComparisonData, RowData

# Colours that stay distinguishable for colour-blind readers, on white and on black.
PALETTE = ("#0f7fc4", "#dd5f0c", "#079268", "#c25f9a", "#a3780a", "#8367d6", "#c9404a", "#5d7f88")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x", "pentagon", "star")
ALL_ROWS = "rows"  # the name of the only series if rows differ in numbers only


@dataclass(frozen=True)
class Style:
    """How a series looks in every figure."""

    colour: str
    symbol: str


def is_number(value: Any) -> bool:
    """Tell whether a setting's value is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def find_series(row: RowData, by: Sequence[str]) -> str:
    """Return the series of a row: its method, or else the first compared setting that is not a number."""
    if "method" in by:
        value = row["by"].get("method")
        return ALL_ROWS if value is None else str(value)
    for key in by:
        value = row["by"].get(key)
        if value is not None and not is_number(value):
            return str(value)
    return ALL_ROWS


def make_styles(comparison: ComparisonData) -> dict[str, Style]:
    """Return colour and symbol of each series.

    Series are sorted by name, so that the same methods look the same in every report about them.
    """
    names = sorted({find_series(row, comparison["by"]) for row in comparison["rows"]})
    found = {}
    for place, name in enumerate(names):
        found[name] = Style(PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)])
    return found
