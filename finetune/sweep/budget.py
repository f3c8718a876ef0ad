"""One budget for all methods: the setting that decides a method's size is solved, so that they train, or store, alike. Imports no torch at the top.

``budget=0.5%``   of all parameters of the model (``params.total``) are trained
``budget=400k``   entries are trained (k, M, G: thousands, millions, milliards)
``budget=1MB``    are stored, as ``stored_bytes`` has it (kB, MB, GB: powers of 1000; KiB, MiB, GiB: of 1024)

The task's new head, which all methods train alike, does not count as trained; it is stored with the rest. Stored bytes of entries that data chooses
are expected ones: they take their positions to lie at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from annotated_types import Ge, Gt, MultipleOf

from ..config import load as configuration
from ..config.grammar import ALIASES
from ..config.settings import Config
from ..errors import ConfigError

TOLERANCE = 0.02  # of the budget
ENOUGH = 0.001  # below this no more digits are tried
FINE = 10**9  # steps of a share
LARGEST = 2**24  # of whole numbers
COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "m": 10**6, "G": 10**9}
BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*(%|[a-zA-Z]*)")


_known: dict[str, float] = {}


class FixedSize(ConfigError):
    """The method has no setting that decides its size; ``words`` say so in a note on a point that is left out of a sweep."""

    @property
    def words(self) -> str:
        """The fault, as a note."""
        return self.faults[0]


@dataclass(frozen=True)
class Budget:
    """A share of the model's parameters, a number of trained entries, or stored bytes; ``text`` as it was written."""

    text: str
    amount: float
    kind: Literal["share", "trained", "stored"]

    def target(self, total: int) -> float:
        """Entries or bytes, for a model of ``total`` parameters."""
        return self.amount * total if self.kind == "share" else self.amount

    def show(self, amount: float, total: int) -> str:
        """An amount of what this budget counts."""
        if self.kind == "stored":
            return f"{round(amount):,} bytes stored"
        return f"{round(amount):,} trained" + (
            f" ({100 * amount / total:.3g}%)" if self.kind == "share" else ""
        )


def parse(text: str) -> Budget:
    """The budget that ``text`` writes, without ``budget=``. Raises ``ConfigError``."""
    found = NUMBER.fullmatch(text.strip())
    unit = found[3] if found else ""
    if not found or unit not in {"%", *COUNTS, *BYTES}:
        raise ConfigError(
            f"budget={text} is no budget. Write a share of the model's parameters (0.5%), a number of trained ones (400k, 1.5M), or bytes "
            "stored (1MB, 512KiB)."
        )
    number = float(found[1] + (found[2] or ""))
    if number <= 0 or (unit == "%" and number > 100):
        raise ConfigError(
            f"budget={text} leaves {'nothing to train' if number <= 0 else 'more than the model has'}; take a share above 0 up to 100%."
        )
    if unit == "%":
        return Budget(text, number / 100, "share")
    return Budget(text, number * (COUNTS.get(unit) or BYTES[unit]), "trained" if unit in COUNTS else "stored")


def solve(
    budget: str, overrides: list[str], config_dir: Path | None = None, config_file: Path | None = None
) -> list[str]:
    """``overrides`` of one run, with the setting that makes it meet ``budget`` (without ``budget=``) within 2 %.

    Raises ``FixedSize`` where there is no such setting, and ``ConfigError`` with the nearest sizes where none is near enough.
    """
    wanted, config = (
        parse(budget),
        replace(configuration.load(overrides, config_dir, config_file), seed=0),
    )  # all seeds get the same
    knob = config.method.size
    if knob and (given := [text for text in overrides if _key(text) == f"method.{knob}"]):
        raise ConfigError(
            f"{given[0]} and budget={budget} both say how much method={config.method.name} trains; keep one of them."
        )
    if not knob:
        raise FixedSize(_fixed(config, wanted))
    tree = {
        name: part
        for name, part in config.as_dict().items()
        if name in ("model", "dataset", "method", "train")
    }
    key = json.dumps([budget, tree], sort_keys=True)
    if key not in _known:
        _known[key] = _solved(config, wanted)
    return [*overrides, f"method.{knob}={_text(_known[key])}"]


def _key(text: str) -> str:
    key = text.partition("=")[0]
    return ALIASES.get(key, key)


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9f}".rstrip("0").rstrip(".")


def _fixed(config: Config, wanted: Budget) -> str:
    from . import size

    amount, total = _amount(size.measure(config), wanted), size.frame(config).total
    return f"method={config.method.name} has no setting for its size, which is fixed: {wanted.show(amount, total)}; it cannot meet budget={wanted.text}."


def _amount(found: Any, wanted: Budget) -> int:
    return int(found.stored if wanted.kind == "stored" else found.trained - found.head)


@dataclass(frozen=True)
class Ladder:
    """The values of a setting in the order in which the size grows, by rung: ``first`` to ``last``."""

    first: int
    last: int
    value: Callable[[int], float]
    rung: Callable[[float], int]
    digits: bool  # whether values may be rounded


def ladder(config: Config) -> Ladder:
    """All values that the type of the method's size setting allows."""
    knob = config.method.size
    if knob == "sparsity":
        return Ladder(1, FINE, lambda i: round(1 - i / FINE, 9), lambda v: round((1 - v) * FINE), True)
    hint = get_type_hints(type(config.method), include_extras=True).get(knob, int)
    if (getattr(hint, "__origin__", hint)) is float:
        return Ladder(1, FINE, lambda i: round(i / FINE, 9), lambda v: round(v * FINE), True)
    bounds: dict[type, Any] = {type(m): m for m in getattr(hint, "__metadata__", ())}
    step = int(bounds[MultipleOf].multiple_of) if MultipleOf in bounds else 1
    least = int(bounds[Ge].ge) if Ge in bounds else int(bounds[Gt].gt) + 1 if Gt in bounds else 1
    return Ladder(-(-least // step), LARGEST, lambda i: i * step, lambda v: int(v) // step, False)


def _changed(method: Any, value: float) -> Any:
    """``method`` with another value of its size setting, which may be a key of a mapping."""
    name, _, key = method.size.partition(".")
    return replace(method, **{name: {**getattr(method, name), key: value} if key else value})


def _current(config: Config) -> float | None:
    name, _, key = config.method.size.partition(".")
    value = getattr(config.method, name)
    current: float | None = value.get(key) if key else value
    return current


class _Scale:
    """The amount of a budget's kind at each value of the size setting; ``whys`` are the reasons of values that the method refuses."""

    def __init__(self, config: Config, wanted: Budget) -> None:
        self.config, self.wanted = config, wanted
        self.whys: list[ConfigError] = []
        self._known: dict[float, int | None] = {}

    def __call__(self, value: float) -> int | None:
        """``None`` where the method refuses the value. Raises ``ConfigError`` where nothing can be said of any."""
        if value not in self._known:
            self._known[value] = self._measured(value)
        return self._known[value]

    def off(self, value: float, target: float) -> float:
        """How far the amount at ``value``, which the method allows, is from the target."""
        return abs((self(value) or 0) - target)

    def _measured(self, value: float) -> int | None:
        from . import size

        name = self.config.method.name
        try:
            method = _changed(self.config.method, value)
            size.check(self.config, method)
            found = size.measure(self.config, method)
        except (ConfigError, ValueError) as error:
            self.whys.append(
                error if isinstance(error, ConfigError) else ConfigError(f"method={name}: {error}")
            )
            return None
        if self.wanted.kind == "stored" and not found.stored:
            raise ConfigError(
                f"method={name}: what it stores is decided while it trains, so budget={self.wanted.text} cannot be solved for; give the number of "
                "trained parameters, or a share (0.5%)."
            )
        return _amount(found, self.wanted)


def _solved(config: Config, wanted: Budget) -> float:
    """The value of the size setting."""
    from . import size

    total = size.frame(config).total
    scale, rungs, target = _Scale(config, wanted), ladder(config), wanted.target(total)
    options = [
        _shortest(rungs, i, scale, target) for i in _around(config, rungs, scale, target) if i is not None
    ]
    best = min(options, key=lambda value: scale.off(value, target))
    if scale.off(best, target) <= TOLERANCE * target:
        return best
    reach = " and ".join(
        f"method.{config.method.size}={_text(v)} with {wanted.show(scale(v) or 0, total)}"
        for v in dict.fromkeys(options)
    )
    raise ConfigError(
        f"method={config.method.name} cannot meet budget={wanted.text}, {wanted.show(target, total)}, within 2 %. The nearest it reaches: {reach}. "
        "Take a budget near one of these, or change its other settings."
    )


def _around(config: Config, rungs: Ladder, scale: _Scale, target: float) -> tuple[int | None, int | None]:
    """The last rung below the target and the first that reaches it, among those that the method allows; ``None`` where there is none.

    One alone if it is near enough.
    """
    anchor = _anchor(config, rungs, scale)

    def reaches(i: int) -> bool:
        amount = scale(rungs.value(i))
        return i > anchor if amount is None else amount >= target

    low, high = rungs.first - 1, rungs.last + 1
    if not rungs.digits:  # there is no largest size to begin with
        if scale(rungs.value(anchor)) == scale(rungs.value(2 * anchor)):
            name, knob = config.method.name, config.method.size
            raise FixedSize(
                f"method={name}: method.{knob} does not change how much it trains here, so no budget can be met by it."
            )
        high = anchor
        while not reaches(high) and high < rungs.last:
            high = min(2 * high, rungs.last)
    middle = _guess(rungs, scale, target)
    while high - low > 1:
        middle = middle if low < middle < high else (low + high) // 2
        if (
            rungs.digits
            and scale(rungs.value(middle)) is not None
            and scale.off(rungs.value(middle), target) <= ENOUGH * target
        ):
            return middle, None
        low, high = (low, middle) if reaches(middle) else (middle, high)
    below, above = (
        i if rungs.first <= i <= rungs.last and scale(rungs.value(i)) is not None else None
        for i in (low, high)
    )
    return below, above


def _guess(rungs: Ladder, scale: _Scale, target: float) -> int:
    """Where the target would be if sizes of a share grew in proportion; 0 for nowhere."""
    most = scale(rungs.value(rungs.last)) if rungs.digits else None
    return round(target / most * rungs.last) if most else 0


def _anchor(config: Config, rungs: Ladder, scale: _Scale) -> int:
    """A rung that the method allows: its present one, else the lowest or the highest. Raises the method's ``ConfigError`` if it refuses all."""
    now = _current(config)
    tries = [rungs.rung(now)] if isinstance(now, int | float) else []
    ends = [rungs.first, rungs.last] if rungs.digits else [rungs.first]
    found = next(
        (i for i in [*tries, *ends] if rungs.first <= i <= rungs.last and scale(rungs.value(i)) is not None),
        None,
    )
    if found is None:
        raise scale.whys[0]
    return found


def _shortest(rungs: Ladder, i: int, scale: _Scale, target: float) -> float:
    """The value of a rung, in as few decimals as change nothing, or are near enough to the target."""
    exact = rungs.value(i)
    for digits in range(2, 9) if rungs.digits else ():
        value = round(exact, digits)
        allowed = rungs.first <= rungs.rung(value) <= rungs.last and scale(value) is not None
        if allowed and (scale(value) == scale(exact) or scale.off(value, target) <= ENOUGH * target):
            return value
    return exact
