"""Name the parts of a comparison's JSON, ``Comparison.as_dict()``, from which every output is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ComparisonData = Mapping[str, Any]  # the whole
MetricData = Mapping[str, Any]  # its "metric": name, words, higher_is_better, percent
RowData = Mapping[str, Any]  # one of its "rows"
Verdict = dict[str, Any]  # one of its "tests", or the "versus" of a row
Finding = dict[str, Any]  # one of its "fairness": kind, what, values, words


def has_any(items: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Tell whether at least one of ``items`` has a value for ``key``."""
    return any(item[key] is not None for item in items)


def has_all(items: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Tell whether all of ``items`` have a value for ``key``."""
    return all(item[key] is not None for item in items)
