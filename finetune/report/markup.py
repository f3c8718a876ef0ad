"""Text of runs inside HTML."""

from __future__ import annotations

import html

from ..errors import visible


def escape(text: str) -> str:
    """``text`` as HTML that shows it letter by letter, control characters as what they are written by."""
    return html.escape(visible(text))
