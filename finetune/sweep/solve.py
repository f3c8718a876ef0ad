"""Solve the setting that decides a method's size, so that a run meets its budget.

Imports no torch at the top.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from annotated_types import Ge, Gt, MultipleOf

from ..config import load as configuration
from ..config.grammar import ALIASES
from ..config.settings import Config
from ..errors import ConfigError
from .budget import Budget, FixedSize, parse

TOLERANCE = 0.02  # share of the budget by which a solution may miss it
EXACT = 0.001  # share of the budget; once the error is below it, no further digits are tried
FINE = 10**9  # number of rungs between the shares 0 and 1
LARGEST = 2**24  # largest whole number that is tried

_solutions: dict[str, float] = {}  # by budget and settings; all seeds of a sweep share a solution


def solve(
    budget: str, overrides: list[str], config_dir: Path | None = None, config_file: Path | None = None
) -> list[str]:
    """Return ``overrides`` of one run with the setting that makes it meet ``budget`` within 2 %.

    ``budget`` is the text without ``budget=``. Raises ``FixedSize`` if there is no such setting, and
    ``ConfigError`` with the nearest sizes if none is near enough.
    """
    wanted = parse(budget)
    config = replace(configuration.load(overrides, config_dir, config_file), seed=0)  # all seeds get the same
    knob = config.method.size
    if not knob:
        raise FixedSize(_describe_fixed(config, wanted))
    for text in overrides:
        key = text.partition("=")[0]
        if ALIASES.get(key, key) == f"method.{knob}":
            raise ConfigError(
                f"{text} and budget={budget} both say how much method={config.method.name} trains; keep "
                "one of them."
            )
    tree = config.as_dict()
    deciding = {name: tree[name] for name in ("model", "dataset", "method", "train")}
    key = json.dumps([budget, deciding], sort_keys=True)
    if key not in _solutions:
        _solutions[key] = _solve(config, wanted)
    return [*overrides, f"method.{knob}={_show_value(_solutions[key])}"]


def _show_value(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.9f}".rstrip("0").rstrip(".")


def _describe_fixed(config: Config, wanted: Budget) -> str:
    from . import size

    amount, total = wanted.amount_of(size.measure(config)), size.frame(config).total
    return (
        f"method={config.method.name} has no setting for its size, which is fixed: "
        f"{wanted.show(amount, total)}; it cannot meet budget={wanted.text}."
    )


@dataclass(frozen=True)
class Ladder:
    """The values of a size setting in the order in which the size grows; each value has a number, its rung.

    With a ``step``, rung i is the whole number i * step. Without one, rung i is the share i / FINE, or 1 - i
    / FINE if the setting is ``falling``: a larger value makes the size smaller.
    """

    first: int
    last: int
    step: int = 0
    falling: bool = False

    @property
    def of_shares(self) -> bool:
        """Whether the values are shares, which may be rounded."""
        return self.step == 0

    def value(self, rung: int) -> float:
        """Return the value of a rung."""
        if self.step:
            return rung * self.step
        share = rung / FINE
        return round(1 - share, 9) if self.falling else round(share, 9)

    def rung(self, value: float) -> int:
        """Return the rung of a value."""
        if self.step:
            return int(value) // self.step
        return round((1 - value if self.falling else value) * FINE)

    def __contains__(self, rung: int) -> bool:
        return self.first <= rung <= self.last


def ladder(config: Config) -> Ladder:
    """Return all values that the type of the method's size setting allows."""
    knob = config.method.size
    if knob == "sparsity":
        return Ladder(1, FINE, falling=True)
    hint = get_type_hints(type(config.method), include_extras=True).get(knob, int)
    if getattr(hint, "__origin__", hint) is float:
        return Ladder(1, FINE)
    step, least = 1, 1
    for bound in getattr(hint, "__metadata__", ()):
        if isinstance(bound, MultipleOf):
            step = int(bound.multiple_of)  # type: ignore[call-overload]  # a number
        elif isinstance(bound, Ge):
            least = int(bound.ge)  # type: ignore[call-overload]  # a number
        elif isinstance(bound, Gt):
            least = int(bound.gt) + 1  # type: ignore[call-overload]  # a number
    return Ladder(-(-least // step), LARGEST, step)


def _with_value(method: Any, value: float) -> Any:
    """Return ``method`` with another value of its size setting, which may be a key of a mapping."""
    name, _, key = method.size.partition(".")
    if key:
        return replace(method, **{name: {**getattr(method, name), key: value}})
    return replace(method, **{name: value})


def _current_value(config: Config) -> Any:
    name, _, key = config.method.size.partition(".")
    value = getattr(config.method, name)
    return value.get(key) if key else value


class _Solver:
    """Finds the value of one configuration's size setting that meets a budget."""

    def __init__(self, config: Config, wanted: Budget) -> None:
        from . import size

        self.config, self.wanted, self.ladder = config, wanted, ladder(config)
        self.total = size.frame(config).total
        self.target = wanted.target(self.total)
        self._refusals: list[ConfigError] = []  # of values that the method does not allow
        self._amounts: dict[float, int | None] = {}

    def amount(self, value: float) -> int | None:
        """Return the amount of the budget's kind at ``value``; ``None`` if the method refuses the value.

        Raises ``ConfigError`` if no value has a known amount.
        """
        if value not in self._amounts:
            self._amounts[value] = self._measure(value)
        return self._amounts[value]

    def _measure(self, value: float) -> int | None:
        from . import size

        name = self.config.method.name
        try:
            method = _with_value(self.config.method, value)
            size.check(self.config, method)
            found = size.measure(self.config, method)
        except ConfigError as error:
            self._refusals.append(error)
            return None
        except ValueError as error:
            self._refusals.append(ConfigError(f"method={name}: {error}"))
            return None
        if self.wanted.kind == "stored" and not found.stored:
            raise ConfigError(
                f"method={name}: what it stores is decided while it trains, so budget={self.wanted.text} "
                "cannot be solved for; give the number of trained parameters, or a share (0.5%)."
            )
        return self.wanted.amount_of(found)

    def distance(self, value: float) -> float:
        """Return how far the amount at ``value``, which the method allows, is from the target."""
        return abs((self.amount(value) or 0) - self.target)

    def is_exact(self, value: float) -> bool:
        """Tell whether the method allows ``value`` and its amount is within ``EXACT`` of the target."""
        return self.amount(value) is not None and self.distance(value) <= EXACT * self.target

    def solve(self) -> float:
        """Return the value nearest to the target. Raises ``ConfigError`` if it is not near enough."""
        values = [self._shortest(rung) for rung in self._nearest_rungs()]
        best = min(values, key=self.distance)
        if self.distance(best) <= TOLERANCE * self.target:
            return best
        setting = f"method.{self.config.method.size}"
        reached = []
        for value in dict.fromkeys(values):
            amount = self.wanted.show(self.amount(value) or 0, self.total)
            reached.append(f"{setting}={_show_value(value)} with {amount}")
        raise ConfigError(
            f"method={self.config.method.name} cannot meet budget={self.wanted.text}, "
            f"{self.wanted.show(self.target, self.total)}, within 2 %. The nearest are "
            f"{' and '.join(reached)}. Take a budget near one of these, or change the method's other "
            "settings."
        )

    def _nearest_rungs(self) -> list[int]:
        """Return the last allowed rung below the target and the first that reaches it, if they exist.

        Only one rung is returned if it is exact. Bisects between ``low``, below the target, and ``high``,
        which reaches it.
        """
        allowed = self._allowed_rung()
        low, high = self.ladder.first - 1, self.ladder.last + 1
        if not self.ladder.of_shares:
            high = self._first_doubling(allowed)
        middle = self._guess()
        while high - low > 1:
            if not low < middle < high:
                middle = (low + high) // 2
            if self.ladder.of_shares and self.is_exact(self.ladder.value(middle)):
                return [middle]
            if self._reaches(middle, allowed):
                high = middle
            else:
                low = middle
        return [rung for rung in (low, high) if self._is_allowed(rung)]

    def _first_doubling(self, rung: int) -> int:
        """Return the first of ``rung``, 2 * ``rung``, 4 * ``rung``, ... that reaches the target, or the last.

        Raises ``FixedSize`` if the setting changes nothing.
        """
        if self.amount(self.ladder.value(rung)) == self.amount(self.ladder.value(2 * rung)):
            name, knob = self.config.method.name, self.config.method.size
            raise FixedSize(
                f"method={name}: method.{knob} does not change the size of this run, so it cannot be used to "
                "meet a budget."
            )
        high = rung
        while high < self.ladder.last and not self._reaches(high, rung):
            high = min(2 * high, self.ladder.last)
        return high

    def _reaches(self, rung: int, allowed: int) -> bool:
        """Tell whether a rung reaches the target.

        A refused value counts as too small below ``allowed``, an allowed rung, and as large enough above it.
        """
        amount = self.amount(self.ladder.value(rung))
        return rung > allowed if amount is None else amount >= self.target

    def _is_allowed(self, rung: int) -> bool:
        return rung in self.ladder and self.amount(self.ladder.value(rung)) is not None

    def _guess(self) -> int:
        """Return the rung where the target would be if size grew in proportion to the share; 0 if unknown."""
        if not self.ladder.of_shares:
            return 0
        most = self.amount(self.ladder.value(self.ladder.last))
        return round(self.target / most * self.ladder.last) if most else 0

    def _allowed_rung(self) -> int:
        """Return a rung that the method allows: that of its current value, else the lowest, else the highest.

        Raises the method's own ``ConfigError`` if it refuses all three.
        """
        rungs = [self.ladder.first]
        if self.ladder.of_shares:
            rungs.append(self.ladder.last)
        current = _current_value(self.config)
        if isinstance(current, int | float):
            rungs.insert(0, self.ladder.rung(current))
        for rung in rungs:
            if self._is_allowed(rung):
                return rung
        raise self._refusals[0]

    def _shortest(self, rung: int) -> float:
        """Return a rung's value with as few decimals as keep the size the same, or exact enough."""
        full = self.ladder.value(rung)
        if not self.ladder.of_shares:
            return full
        for digits in range(2, 9):
            value = round(full, digits)
            if self.ladder.rung(value) not in self.ladder or self.amount(value) is None:
                continue
            if self.amount(value) == self.amount(full) or self.is_exact(value):
                return value
        return full


def _solve(config: Config, wanted: Budget) -> float:
    """Return the value of the size setting that meets the budget."""
    return _Solver(config, wanted).solve()
