"""Train one run by several processes: started here by torch's launcher, or outside by ``accelerate launch``.

The launching process trains nothing. It passes signals on, ends all ranks when one dies, and reports why.
Imports no torch before ``launch`` or ``train_rank`` is called.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..config import strict
from ..config.settings import Config
from ..errors import ConfigError, FinetuneError, RunFailed, make_printable
from ..storage.run_folder import RunFolder
from ..system.environment import count_cores, rank
from ..system.exit_code import INTERRUPTED
from ..system.progress import ProgressBar
from ..system.signals import Interrupted, Signals
from .resume import command
from .start import StartOptions, end_with

GRACE = 10.0  # seconds that the other ranks have to end by themselves when one has failed
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# A process that ends abruptly leaves locks of libraries behind; Python's tracker frees them, with a warning.
WARNINGS = "ignore:resource_tracker:UserWarning"
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")
MOST_TRACE = 8000  # characters of a traceback that a rank reports
Report = dict[str, Any]  # what a failed rank reports: rank, code, lines, severed, trace, at


class Severed(RunFailed):
    """The connection to another rank is lost, because that rank has ended."""


class ProcessFailed(Exception):
    """A rank raised an unexpected error; the cause holds that rank's traceback."""


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether a collective failed because another rank has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_CONNECTION)


def train_rank(config: Config, folder: Path, signals: Signals) -> dict[str, Any]:
    """Train as one of the run's ranks, and return the result. Only rank 0 shows its progress.

    Raises what ``run.train`` raises, and ``Severed`` where another rank has ended.
    """
    from ..training import run

    try:
        if rank() != 0:
            return run.train(config, folder, _say_nothing, _show_nothing, signals)
        with ProgressBar() as progress:
            return run.train(config, folder, progress.say, progress, signals)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise Severed(
            f"Another process of this run has ended, so this one cannot continue. {_how_to_resume(folder)}"
        ) from error


def _say_nothing(line: str) -> None:
    """Print nothing, on ranks other than 0."""


def _show_nothing(done: int, total: int, words: str) -> None:
    """Show no progress, on ranks other than 0."""


def launch(config: Config, folder: Path, count: int, options: StartOptions) -> dict[str, Any]:
    """Train ``config`` in ``folder`` by ``count`` ranks on this machine; return the run's result.

    Raises the error of the first rank that failed, ``RunFailed`` if a signal killed a rank, and
    ``Interrupted`` if a signal asked the run to stop.
    """
    if faults := _misfits(config, count):
        raise ConfigError(*faults)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not in __all__
    from torch.multiprocessing.spawn import start_processes

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(count)]
    writers = [writer for _, writer in pipes]
    with _environment_of_ranks(count):
        started = start_processes(
            _run_rank,
            (count, store.port, os.getpid(), options, config.as_dict(), folder, writers),
            count,
            join=False,
        )
    assert started is not None
    try:
        killed = _supervise(started.processes)
    finally:
        for process in started.processes:
            process.kill()
    reports = [reader.recv() for reader, _ in pipes if reader.poll()]
    codes = [process.exitcode for process in started.processes]
    for i in killed:  # ended by this process, so the exit code says nothing about the cause
        codes[i] = 0
    _raise_cause(codes, reports, folder)
    return RunFolder(folder).read_result()


def _misfits(config: Config, count: int) -> list[str]:
    """Return the reasons why ``count`` ranks cannot be started here."""
    if "LOCAL_RANK" in os.environ:
        return [
            f"--processes {count} was given inside `accelerate launch` or torchrun, which starts the "
            "processes itself. Leave one of the two out."
        ]
    if config.train.device == "cpu":
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = torch.cuda.device_count()
    if count <= gpus:
        return []
    return [f"--processes {count}, but there are {gpus} GPUs here. Take fewer, or train.device=cpu."]


@contextmanager
def _environment_of_ranks(count: int) -> Iterator[None]:
    """Set environment variables for ranks started inside the block; keep those that the user has set.

    Each rank gets an equal share of the cores.
    """
    ours = {"TORCH_MP_PARALLEL_START": "0"}
    threads = str(max(1, count_cores() // count))
    defaults = dict.fromkeys(THREADS, threads) | {"PYTHONWARNINGS": WARNINGS}
    for name, value in defaults.items():
        if name not in os.environ:
            ours[name] = value
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _supervise(processes: Sequence[Any]) -> set[int]:
    """Wait until all ranks have ended; return the numbers of those that had to be killed.

    When one has failed, or a signal came, the others have ``GRACE`` seconds to end by themselves.
    """
    try:
        _wait_for_first_failure(processes)
    except Interrupted as stop:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.Signals[stop.name])
        _wait_for_first_failure(processes)
    _wait_until(processes, time.monotonic() + GRACE)
    killed = {i for i, process in enumerate(processes) if process.is_alive()}
    for i in killed:
        processes[i].kill()
    for process in processes:
        process.join()
    return killed


def _wait_for_first_failure(processes: Sequence[Any]) -> None:
    """Return when all processes have ended, or one has failed."""
    while _wait_a_moment(processes):
        if any(process.exitcode for process in processes):
            return


def _wait_until(processes: Sequence[Any], end: float) -> None:
    """Return when all processes have ended, or at the time ``end`` of ``time.monotonic``."""
    while time.monotonic() < end and _wait_a_moment(processes):
        pass


def _wait_a_moment(processes: Sequence[Any]) -> bool:
    """Wait up to 0.5 s for a process to end; return whether any process was alive before the wait."""
    alive = [process.sentinel for process in processes if process.is_alive()]
    if alive:
        wait(alive, timeout=0.5)
    return bool(alive)


def _how_to_resume(folder: Path) -> str:
    return f"Everything saved before is complete; `{command(folder)}` resumes the run."


def _raise_cause(codes: list[int], reports: list[Report], folder: Path) -> None:
    """Raise the error that ended the run; return if all exit codes are 0."""
    if not any(codes):
        return
    for i, code in enumerate(codes):
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise RunFailed(
                f"Process {i} of {len(codes)} was ended by {signal.Signals(-code).name}{hint}, and the "
                f"others with it. {_how_to_resume(folder)}"
            )
    if not reports:
        raise RunFailed(f"The processes ended with the exit codes {codes}.")
    # Lost connections are only consequences, so a rank's own error is reported in preference to them.
    reports.sort(key=lambda report: (report["severed"], report["at"]))
    cause = reports[0]
    if cause["code"] == INTERRUPTED:
        stop = Interrupted(cause["lines"][0])
        saved = [report["lines"][1] for report in reports if report["code"] == INTERRUPTED]
        stop.saved = max(saved, key=len)  # only the rank that wrote a checkpoint describes it
        raise stop
    if cause["code"] == ConfigError.exit_code:
        raise ConfigError(*cause["lines"])
    if cause["trace"]:
        what = f"process {cause['rank']} of {len(codes)}: {cause['lines'][0]}"
        raise ProcessFailed(what) from ProcessFailed(cause["trace"])
    raise RunFailed(cause["lines"][0])


def _run_rank(
    number: int,
    count: int,
    port: int,
    parent: int,
    options: StartOptions,
    settings: dict[str, Any],
    folder: Path,
    writers: Sequence[Any],
) -> None:
    """Train as rank ``number``; report a failure through this rank's pipe in ``writers``.

    The configuration is passed as plain values, because a plug-in's class exists only after ``options`` are
    applied.
    """
    end_with(parent)
    os.setpgid(0, 0)  # the launching process passes a terminal's Ctrl-C on, so it must not arrive here too
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    report: Report = {"rank": number, "severed": False, "trace": ""}
    try:
        with Signals() as signals:
            options.apply()
            train_rank(strict.build(strict.Composed(settings, {})), folder, signals)
        return
    except Interrupted as stop:
        report |= {"code": INTERRUPTED, "lines": [stop.name, stop.saved]}
    except ConfigError as error:
        report |= {"code": error.exit_code, "lines": list(error.faults)}
    except FinetuneError as error:
        severed_by_other = isinstance(error, Severed)
        report |= {
            "code": error.exit_code,
            "lines": [make_printable(str(error))],
            "severed": severed_by_other,
        }
    except Exception as error:
        what = make_printable(f"{type(error).__name__}: {error}")
        report |= {"code": 1, "lines": [what], "trace": traceback.format_exc()[-MOST_TRACE:]}
    writers[number].send(report | {"at": time.monotonic()})
    sys.stderr.flush()
    os._exit(report["code"])  # without destructors, which would wait for the other ranks
