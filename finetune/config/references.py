"""``${key}`` in a setting: the value of another setting, and nothing else.

OmegaConf would also call functions, among them one that reads environment variables, and would repeat references of references without end. What a
run was asked for must be plain, must hold no secret, and must be of bounded size, so all that is refused before anything is resolved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .origins import origin_of

REFERENCE = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)\}")
MOST = 64  # references in one configuration
TEXT_BYTES = 2**16


def faults(values: Mapping[str, Any], origins: dict[str, str]) -> list[str]:
    """Every text that asks for more than the plain value of a named setting."""
    found, count = list[str](), 0
    for key, text in _texts(values, ""):
        if "${" not in text:
            continue
        keys = REFERENCE.findall(text)
        count += len(keys)
        wrong = [name for name in keys if not _is_plain(values, name)]
        if "${" in REFERENCE.sub("", text):
            why = "a value can refer to another setting by ${key}, and to nothing else: no functions, no environment variables"
        elif wrong:
            why = f"{wrong[0]} is not one plain value that could stand in its place"
        else:
            continue
        found.append(f"{key}={text!r}{_from(key, origins)}: {why}. Write the value itself.")
    if count > MOST:
        found.append(
            f"The settings hold {count} references by ${{key}}, and at most {MOST} are resolved. Write the values themselves."
        )
    return found


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{key}.{name}" if key else str(name))


def _is_plain(values: Any, key: str) -> bool:
    """Whether the setting is one value without references; one that is absent is told of by OmegaConf."""
    for step in key.split("."):
        if not isinstance(values, dict) or step not in values:
            return True
        values = values[step]
    return not isinstance(values, dict | list) and "${" not in str(values) and len(str(values)) <= TEXT_BYTES


def _from(key: str, origins: dict[str, str]) -> str:
    origin = origin_of(key, origins)
    return f" ({origin})" if origin else ""
