"""Print plain values on a terminal: nested mappings as indented lines, lists of mappings as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import make_printable
from ..report.metric import show_bytes


def show_tree(value: Mapping[str, Any], as_json: bool) -> None:
    """Print nested values on standard output, as JSON or for people."""
    if as_json:
        print(json.dumps(value, indent=2))
        return
    for name, item in value.items():
        _print_item(name, item, "")


def _print_item(name: str, item: Any, indent: str) -> None:
    if isinstance(item, Mapping):
        print(f"{indent}{name}")
        for key, inner in item.items():
            _print_item(str(key), inner, indent + "  ")
    elif isinstance(item, list) and item and isinstance(item[0], Mapping):
        show_table(item)
    elif isinstance(item, list) and indent:
        print(f"{indent}{name}: {', '.join(_show_value(value) for value in item) or '-'}")
    elif isinstance(item, list) and all(isinstance(line, str) for line in item):
        for line in item:
            print(f"{indent}{make_printable(line)}")
    elif name.endswith("_bytes"):
        print(f"{indent}{name}: {show_bytes(item)}")
    else:
        print(f"{indent}{name}: {_show_value(item)}")


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print mappings with the same keys as a table on standard output; numbers are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for key in rows[0]:
        has_numbers = any(isinstance(row[key], int | float) for row in rows)
        table.add_column(key, justify="right" if has_numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(_show_value(value)) for value in row.values()])
    Console().print(table)


def _show_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return make_printable(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return make_printable(json.dumps(value, default=str))
