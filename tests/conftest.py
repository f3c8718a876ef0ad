"""Fixtures and rules for all tests."""

from __future__ import annotations

import _posixsubprocess
import gc
import itertools
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest

# Audit events of Python that say that a process is about to be started. "multiprocessing" is ours, see below.
STARTS = frozenset(
    {
        "subprocess.Popen",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "os.exec",
        "multiprocessing",
    }
)
MAY_START = ("processes", "slow", "browser", "slurm")
FAMILIES = sorted(path.name for path in (Path(__file__).parent / "methods").iterdir() if path.is_dir())
FINISHED = itertools.count(1)  # the tests that this process has run
running: pytest.Item | None = None  # the test that runs now, if it may not start a process


def refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    """Fail the running test if it starts a process without being marked for it."""
    if event not in STARTS or running is None:
        return
    for frame in traceback.extract_stack():
        if "importlib._bootstrap" in frame.filename:
            return  # what a library does while it is imported is not the test's doing
    marks = ", ".join(MAY_START)
    pytest.fail(
        f"{running.nodeid} starts a process ({event}: {arguments[0] if arguments else ''}). "
        f"`make test` runs none of these. Call the code in this process instead, or mark the test "
        f"`@pytest.mark.processes` (marks that may: {marks})."
    )


def report_fork_exec(*arguments: Any) -> Any:
    """Start a process for ``multiprocessing``, which raises no audit event of its own."""
    sys.audit("multiprocessing", *arguments[:1])
    return fork_exec(*arguments)


sys.addaudithook(refuse_processes)
fork_exec = _posixsubprocess.fork_exec
_posixsubprocess.fork_exec = report_fork_exec


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let ``--family`` choose the tests of one family of methods."""
    parser.addoption("--family", choices=FAMILIES, help="only the tests of this family of methods")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that do not belong to the family that ``--family`` names."""
    family = config.getoption("--family")
    if not family:
        return
    others = [item for item in items if family not in families_of(item)]
    items[:] = [item for item in items if family in families_of(item)]
    config.hook.pytest_deselected(items=others)


def families_of(item: pytest.Item) -> set[str]:
    """Name the families that a test belongs to, by its folder or by the methods among its parameters."""
    from finetune import registry
    from finetune.testing.cases import Case

    methods = registry.catalog("method")
    found = set(item.path.parts)
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        if isinstance(value, Case):
            found.add(value.family)
        elif isinstance(value, str) and value in methods:
            found.add(methods[value].module.split(".")[-2])
        elif isinstance(value, str):
            found |= set(value.split())
    return found & set(FAMILIES)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch a test, and the fixtures that it is the first to need, for processes."""
    global running
    running = None if any(item.get_closest_marker(mark) for mark in MAY_START) else item
    try:
        return (yield)
    finally:
        running = None


def pytest_collection_finish() -> None:
    """Ask Git for the commit that every result records, before a test does."""
    from finetune.storage.result import git_commit

    git_commit()


@pytest.fixture(scope="session", autouse=True)
def exclude_modules_from_collection() -> None:
    """Import the large libraries once and exclude them from garbage collection.

    Every session of training ends with a full collection, which would search all of torch and transformers.
    """
    from finetune.testing import contract

    contract.tiny()
    gc.freeze()


@pytest.fixture(autouse=True)
def exclude_what_tests_left() -> Iterator[None]:
    """After every 30 tests, exclude from garbage collection what they imported and cached."""
    yield
    if next(FINISHED) % 30 == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def keep_built_in_images() -> Iterator[None]:
    """Read the built-in digits once, and process each small image once, however many runs use them."""
    from finetune.data.digits import Digits
    from finetune.data.encode import Images

    read, process = Digits.read, Images.process
    digits: dict[Any, Any] = {}
    pixels: dict[Any, Any] = {}
    settings: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

    @wraps(read)
    def read_once(self: Digits) -> Any:
        if self not in digits:
            digits[self] = read(self)
        found = digits[self]
        return replace(found, splits={name: list(rows) for name, rows in found.splits.items()})

    def process_once(self: Images, image: Any) -> Any:
        if image.width * image.height > 1024 or not hasattr(self.processor, "to_json_string"):
            return process(self, image)
        if self.processor not in settings:
            settings[self.processor] = self.processor.to_json_string()
        key = (settings[self.processor], image.mode, image.size, image.tobytes())
        if key not in pixels:
            pixels[key] = process(self, image)
        return pixels[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "read", read_once)
        patch.setattr(Images, "process", process_once)
        yield
