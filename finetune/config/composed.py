"""Plain nested values of a configuration before they are checked, with the origin of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .origins import origin_of

LONGEST_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Composed:
    """Plain nested values, the origin of each dotted key, and the raw text of values of the command line."""

    values: dict[str, Any]
    origins: dict[str, str]
    texts: dict[str, str] = field(default_factory=dict)

    def at(self, key: str) -> Any:
        """Return the value at a dotted key, or everything for "". Raises ``KeyError`` if there is none."""
        value: Any = self.values
        if not key:
            return value
        for step in key.split("."):
            value = value[int(step)] if isinstance(value, list) else value[step]
        return value

    def origin(self, key: str) -> str:
        """Return where the value at ``key``, or else a value inside it, came from; "" if that is unknown."""
        found = origin_of(key, self.origins)
        if found:
            return found
        for name, origin in self.origins.items():
            if name.startswith(f"{key}."):
                return origin
        return ""

    def describe(self, key: str, value: Any) -> str:
        """Return ``key=value (origin)`` for a message, with a long value cut."""
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
        if len(text) > LONGEST_SHOWN:
            text = f"{text[: LONGEST_SHOWN - 3]}..."
        origin = self.origin(key)
        return f"{key}={text} ({origin})" if origin else f"{key}={text}"
