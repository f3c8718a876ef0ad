"""The budget of a sweep, ``budget=``: how much every method of it trains or stores.

``budget=0.5%``  of all parameters of the model (``params.total``) are trained
``budget=400k``  entries are trained (k, M, G: 10^3, 10^6, 10^9)
``budget=1MB``   are stored, as ``stored_bytes`` reports it (kB, MB, GB: powers of 1000; KiB, MiB, GiB: of
                 1024)

The task's new head, which all methods train alike, does not count as trained; it is stored with the rest.
Where data chooses the entries, the stored bytes are an expectation over random positions. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError

COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "m": 10**6, "G": 10**9}
BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*(%|[a-zA-Z]*)")


class FixedSize(ConfigError):
    """The method has no setting that decides its size."""

    @property
    def words(self) -> str:
        """The fault, as a note on a point that is left out of a sweep."""
        return self.faults[0]


@dataclass(frozen=True)
class Budget:
    """A share of the model's parameters, a number of trained entries, or stored bytes.

    ``text`` is how it was written.
    """

    text: str
    amount: float
    kind: Literal["share", "trained", "stored"]

    def target(self, total: int) -> float:
        """Return the entries or bytes for a model of ``total`` parameters."""
        return self.amount * total if self.kind == "share" else self.amount

    def show(self, amount: float, total: int) -> str:
        """Write an amount of what this budget counts."""
        if self.kind == "stored":
            return f"{round(amount):,} bytes stored"
        words = f"{round(amount):,} trained"
        if self.kind == "share":
            words += f" ({100 * amount / total:.3g}%)"
        return words

    def amount_of(self, size: Any) -> int:
        """Return what this budget counts of a ``size.Size``."""
        return int(size.stored) if self.kind == "stored" else int(size.trained - size.head)


def parse(text: str) -> Budget:
    """Parse the text of a budget, without ``budget=``. Raises ``ConfigError``."""
    found = NUMBER.fullmatch(text.strip())
    unit = found[3] if found else ""
    if not found or unit not in {"%", *COUNTS, *BYTES}:
        raise ConfigError(
            f"budget={text} is not a budget. Write a share of the model's parameters (0.5%), a number of "
            "trained ones (400k, 1.5M), or bytes stored (1MB, 512KiB)."
        )
    number = float(found[1] + (found[2] or ""))
    if number <= 0:
        raise ConfigError(f"budget={text} leaves nothing to train; take a share above 0 up to 100%.")
    if unit == "%":
        if number > 100:
            raise ConfigError(f"budget={text} is more than the model has; take a share above 0 up to 100%.")
        return Budget(text, number / 100, "share")
    if unit in COUNTS:
        return Budget(text, number * COUNTS[unit], "trained")
    return Budget(text, number * BYTES[unit], "stored")
