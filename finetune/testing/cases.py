"""Read what a method's own test file says of the method, for the tests that try every method."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.method import Method
from ..core.optimizer import Optimizer
from . import contract, sessions
from .sessions import Kind


@dataclass(frozen=True)
class Case:
    """One method with settings under which a training of six steps does all that the method can do.

    ``name``: the registered name; a second case of the method adds a word ("lora dropout").
    ``make``: gives a new instance.
    ``kinds``: the tiny models on which the contract is tried.
    ``optimizer``: the optimizer's settings in the contract.
    ``data_dependent``: the data or random draws decide what is trained. Two processes that split a batch then
    end near the result of one process, but not within rounding.
    ``settings``: settings of the command line with which the method acts in a short run ("method.window=1").
    ``selectable``: False if ``selector=ist`` refuses the method.
    ``budget``: None if ``budget=49k`` can be met within 2 %. If no setting changes the size of a method, the
    number of values that it trains in the built-in model without its head. If the budget is refused for
    another reason, words of the message.
    """

    name: str
    make: Callable[[], Method]
    kinds: tuple[Kind, ...] = ("vit",)
    optimizer: Optimizer = sessions.OPTIMIZER
    data_dependent: bool = False
    settings: tuple[str, ...] = ()
    selectable: bool = True
    budget: int | str | None = None

    @property
    def method(self) -> str:
        """Return the registered name of the method."""
        return self.make().name

    @property
    def family(self) -> str:
        """Return the folder of the method in ``finetune/methods``, or its package if it lies elsewhere."""
        return type(self.make()).__module__.split(".")[-2]


@dataclass(frozen=True)
class Published:
    """The default hyperparameters of a paper or of its authors' code, and the departures from them.

    ``source``: the arXiv number, and what was read. ``values``: the published value of each field.
    ``departures``: for a field whose default here is another one, that default and the reason.
    """

    source: str
    values: dict[str, Any]
    departures: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def expected(self) -> dict[str, Any]:
        """Return the default that each field must have."""
        return self.values | {name: default for name, (default, _) in self.departures.items()}


SMOKE = ("step_zero", "gradients", "stored", "merge", "base_untouched")


def checks_for(method: Method) -> tuple[str, ...]:
    """Name the checks of the contract that a method must pass.

    A preset of the sparse engine is a subclass of ``Sparse`` that sets defaults and overrides no function. It
    must pass the checks that need one training (``SMOKE``). The others test code of the engine alone:
    resuming, the seed, micro-batches and bfloat16. The tests of the engine run them with every schedule and
    grain (tests/methods/sparse/test_sparse.py). ``zeros`` trains once more, so tests/methods/test_zeros.py
    runs it for every case among the slow tests.
    """
    if method.is_preset():
        return SMOKE
    return tuple(name for name in contract.CHECKS if name != "zeros")


def contract_test(cases: Iterable[Case]) -> Callable[..., None]:
    """Make a test function for pytest that runs the checks of every case on each of its models.

    Write ``test_contract = contract_test(CASES)`` in the method's test file.
    """
    import pytest

    parameters = []
    for case in cases:
        for kind in case.kinds:
            for check in checks_for(case.make()):
                parameters.append(pytest.param(case, kind, check, id=f"{case.name}-{kind}-{check}"))

    @lru_cache(maxsize=1)  # pytest runs the checks of one case one after the other
    def trial(case: Case, kind: Kind) -> contract.Trial:
        return contract.Trial(case.make, kind, optimizer=case.optimizer)

    @pytest.mark.parametrize(("case", "kind", "check"), parameters)
    def test_contract(case: Case, kind: Kind, check: str) -> None:
        contract.CHECKS[check](trial(case, kind))

    return test_contract


def find_cases(folder: Path) -> list[Case]:
    """Collect the ``CASES`` of every test file below ``folder``, in the order of the files' names."""
    found: list[Case] = []
    for module in _test_modules(folder):
        found += vars(module).get("CASES", [])
    return found


def find_published(folder: Path) -> dict[str, Published]:
    """Collect the ``PUBLISHED`` of every test file below ``folder``, by the method of its first case."""
    found = {}
    for module in _test_modules(folder):
        if "PUBLISHED" in vars(module):
            found[module.CASES[0].method] = module.PUBLISHED
    return found


@lru_cache
def _test_modules(folder: Path) -> list[ModuleType]:
    """Import every test file below ``folder`` that defines ``CASES``, under a name of its own."""
    modules = []
    for path in sorted(folder.rglob("test_*.py")):
        if "\nCASES = [" not in path.read_text(encoding="utf-8"):
            continue
        name = "cases_of_" + "_".join(path.relative_to(folder).with_suffix("").parts)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        modules.append(module)
    return modules
