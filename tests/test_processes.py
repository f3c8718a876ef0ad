"""A test that is not marked for it cannot start a process (tests/conftest.py)."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

# fork and exec are only announced: without the rule, the tests would continue in two processes, or in none
WAYS: dict[str, Callable[[], Any]] = {
    "Popen": lambda: subprocess.run(["true"]),
    "fork": lambda: sys.audit("os.fork"),
    "posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "spawnlp": lambda: os.spawnlp(os.P_WAIT, "true", "true"),
    "system": lambda: os.system("true"),
    "exec": lambda: sys.audit("os.exec", "true", ["true"], {}),
    "multiprocessing spawn": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "forkserver": lambda: multiprocessing.get_context("forkserver").Process(target=print).start(),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_starting_one_fails_and_names_the_marker(way: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=rf"\[{way}\] starts a process .*pytest.mark.processes"):
        WAYS[way]()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_are_watched_too() -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(subprocess.run(["true"]).returncode))
    thread.start()
    thread.join()
    assert not done


@pytest.mark.processes
def test_a_marked_test_may_start_one() -> None:
    assert subprocess.run(["true"]).returncode == 0
