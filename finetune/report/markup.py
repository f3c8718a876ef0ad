"""Put text from runs into HTML safely."""

from __future__ import annotations

import html

from ..errors import make_printable


def escape(text: str) -> str:
    """Return HTML that displays ``text`` literally; control characters become escape sequences."""
    return html.escape(make_printable(text))
