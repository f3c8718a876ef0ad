"""Plain values on a terminal: nested mappings as indented lines, lists of like mappings as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import visible
from ..report.metric import show_bytes


def show_tree(value: Mapping[str, Any], as_json: bool) -> None:
    """Print nested values on standard output, as JSON or for people."""
    if as_json:
        print(json.dumps(value, indent=2))
        return
    for name, item in value.items():
        _show(name, item, "")


def _show(name: str, item: Any, indent: str) -> None:
    if isinstance(item, Mapping):
        print(f"{indent}{name}")
        for key, inner in item.items():
            _show(str(key), inner, indent + "  ")
    elif isinstance(item, list) and item and isinstance(item[0], Mapping):
        show_table(item)
    elif isinstance(item, list) and all(isinstance(line, str) for line in item):
        print(*(f"{indent}{visible(line)}" for line in item), sep="\n", end="\n" * bool(item))
    else:
        print(f"{indent}{name}: {show_bytes(item) if name.endswith('_bytes') else _text(item)}")


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print mappings of the same keys as a table on standard output; numbers stand to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for key in rows[0]:
        table.add_column(
            key,
            justify="right" if any(isinstance(row[key], int | float) for row in rows) else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(_text(value)) for value in row.values()))
    Console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "-"
    return visible(value if isinstance(value, str) else json.dumps(value, default=str))
