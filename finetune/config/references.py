"""Check ``${key}`` in settings: it may stand for the plain value of another setting, and for nothing else.

OmegaConf would also call functions, one of which reads environment variables, and would follow references
without end. The configuration of a run must be plain, hold no secret and be of bounded size, so everything
else is refused before anything is resolved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .origins import origin_of

REFERENCE = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)\}")
MOST = 64  # references in one configuration
TEXT_BYTES = 2**16


def find_faults(values: Mapping[str, Any], origins: dict[str, str]) -> list[str]:
    """Return a fault for every text that asks for more than the plain value of a named setting."""
    faults: list[str] = []
    count = 0
    for key, text in _texts(values, ""):
        if "${" not in text:
            continue
        names = REFERENCE.findall(text)
        count += len(names)
        reason = _find_reason(values, text, names)
        if reason:
            origin = origin_of(key, origins)
            where = f" ({origin})" if origin else ""
            faults.append(f"{key}={text!r}{where}: {reason}. Write the value itself.")
    if count > MOST:
        faults.append(
            f"The settings hold {count} references by ${{key}}, and at most {MOST} are resolved. Write the "
            "values themselves."
        )
    return faults


def _find_reason(values: Mapping[str, Any], text: str, names: list[str]) -> str:
    """Return why a text with references is refused; "" if it is not."""
    if "${" in REFERENCE.sub("", text):
        return (
            "a value can refer to another setting by ${key}, and to nothing else: no functions, no "
            "environment variables"
        )
    for name in names:
        if not _is_plain(values, name):
            return f"{name} is not one plain value that could stand in its place"
    return ""


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text inside ``value``, with its dotted key."""
    if isinstance(value, str):
        yield key, value
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, inner in items:
        yield from _texts(inner, f"{key}.{name}" if key else str(name))


def _is_plain(values: Any, key: str) -> bool:
    """Return whether a setting is one value without references; OmegaConf reports one that is absent."""
    for step in key.split("."):
        if not isinstance(values, dict) or step not in values:
            return True
        values = values[step]
    text = str(values)
    return not isinstance(values, dict | list) and "${" not in text and len(text) <= TEXT_BYTES
