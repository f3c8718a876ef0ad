"""Fixtures and rules for all tests."""

from __future__ import annotations

import _posixsubprocess
import gc
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
