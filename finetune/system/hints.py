"""Read the type hints of a class once: evaluating them takes longer than most uses of them."""

from __future__ import annotations

import typing
from functools import cache
from typing import Any


@cache
def read_hints(cls: type) -> dict[str, Any]:
    """Return the type hints of a class, with their ``Annotated`` marks. Do not change the result."""
    return typing.get_type_hints(cls, include_extras=True)
