"""Several processes that train one run together: started here by torch's launcher, or by ``accelerate launch``.

The launching process trains nothing. It passes signals on, ends everybody when one process dies, and says why. Imports no torch before ``launch``.
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
from ..errors import ConfigError, FinetuneError, RunFailed, visible
from ..storage.run_folder import RunFolder
from ..system.environment import cores, rank
from ..system.progress import ProgressBar
from ..system.signals import CODE, Interrupted, Signals
from .resume import command
from .start import StartOptions, end_with

GRACE = 10.0  # seconds that the others have to end by themselves when one process has failed
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
QUIET = "ignore:resource_tracker:UserWarning"  # locks of libraries whose process is ended at once are given back by Python's tracker, which says so
SEVERED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")


class Severed(RunFailed):
    """Another process has ended."""


class ProcessFailed(Exception):
    """What another process raised, and nobody expected; its cause is that process's traceback."""


def severed(error: BaseException) -> bool:
    """Whether an exchange failed, as it does in all processes when one of them has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SEVERED)


def work(config: Config, folder: Path, signals: Signals) -> dict[str, Any]:
    """Train as one process of however many there are; only the first shows how far it is. Raises as ``run.train`` does, and ``Severed``."""
    from ..training import run

    try:
        if rank():
            return run.train(config, folder, lambda line: None, lambda done, total, words: None, signals)
        with ProgressBar() as progress:
            return run.train(config, folder, progress.say, progress, signals)
    except RuntimeError as error:
        if not severed(error):
            raise
        raise Severed(
            f"Another process of this run has ended, and no other can go on without it. {_whole(folder)}"
        ) from error


def launch(config: Config, folder: Path, count: int, options: StartOptions) -> dict[str, Any]:
    """Train ``config`` in ``folder`` by ``count`` processes of this machine; the content of the run's ``result.json``.

    Raises what the first process to fail has raised, ``RunFailed`` where a signal ended it, and ``Interrupted`` where one asked the run to stop.
    """
    if faults := _misfits(config, count):
        raise ConfigError(*faults)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, if not by __all__
    from torch.multiprocessing.spawn import start_processes

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(count)]
    with _threads(count):
        started = start_processes(
            _work,
            (count, store.port, os.getpid(), options, config.as_dict(), folder, [w for _, w in pipes]),
            count,
            join=False,
        )
    assert started is not None
    try:
        killed = _supervise(started.processes)
    finally:
        for process in started.processes:
            process.kill()
    words = [reader.recv() for reader, _ in pipes if reader.poll()]
    _judge(
        [0 if i in killed else process.exitcode for i, process in enumerate(started.processes)], words, folder
    )
    return RunFolder(folder).read_result()


def _misfits(config: Config, count: int) -> list[str]:
    """Why ``count`` processes cannot be had."""
    if "LOCAL_RANK" in os.environ:
        return [
            f"--processes {count} inside of `accelerate launch` or torchrun, which have started processes already; leave one of them out."
        ]
    if config.train.device == "cpu":
        return []
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else count
    return (
        []
        if count <= gpus
        else [f"--processes {count}, but there are {gpus} GPUs here. Take fewer, or train.device=cpu."]
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Whoever is started inside gets its share of the cores, unless the user has said how many threads each gets."""
    ours = {name: str(max(1, cores() // count)) for name in THREADS if name not in os.environ} | {
        "TORCH_MP_PARALLEL_START": "0"
    }
    ours |= {"PYTHONWARNINGS": QUIET} if "PYTHONWARNINGS" not in os.environ else {}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _supervise(processes: Sequence[Any]) -> set[int]:
    """Wait until all have ended. Once one has failed the others have ``GRACE`` seconds; returns those that had to be killed."""
    try:
        _wait(processes, None)
    except Interrupted as stop:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.Signals[stop.name])
        _wait(processes, None)
    _wait(processes, time.monotonic() + GRACE)
    killed = {i for i, process in enumerate(processes) if process.is_alive()}
    for i in killed:
        processes[i].kill()
    for process in processes:
        process.join()
    return killed


def _wait(processes: Sequence[Any], until: float | None) -> None:
    """Until all have ended, or one has failed; with ``until``, until all have ended or that time has come."""
    while alive := [process for process in processes if process.is_alive()]:
        if until is None and any(process.exitcode for process in processes):
            return
        if until is not None and time.monotonic() > until:
            return
        wait([process.sentinel for process in alive], timeout=0.5)


def _whole(folder: Path) -> str:
    return f"What was saved before is whole; `{command(folder)}` goes on."


def _judge(codes: list[int], words: list[dict[str, Any]], folder: Path) -> None:
    """Raise what ended the run, if it did not finish. ``words``: what processes said as they failed."""
    if not any(codes):
        return
    for i, code in enumerate(codes):
        if code < 0:
            name = signal.Signals(-code).name
            why = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise RunFailed(
                f"Process {i} of {len(codes)} was ended by {name}{why}, and the others with it. {_whole(folder)}"
            )
    words.sort(key=lambda said: (said["severed"], said["at"]))  # causes before what followed from them
    silent = {"code": 1, "lines": [f"The processes ended with the exit codes {codes}."], "trace": ""}
    first: dict[str, Any] = words[0] if words else silent
    if first["code"] == CODE:
        stop = Interrupted(first["lines"][0])
        stop.saved = max((said["lines"][1] for said in words if said["code"] == CODE), key=len)
        raise stop
    if first["code"] == 2:
        raise ConfigError(*first["lines"])
    if first["trace"]:
        raise ProcessFailed(
            f"process {first['rank']} of {len(codes)}: {first['lines'][0]}"
        ) from ProcessFailed(first["trace"])
    raise RunFailed(first["lines"][0])


def _work(
    number: int,
    count: int,
    port: int,
    parent: int,
    options: StartOptions,
    settings: dict[str, Any],
    folder: Path,
    said: Sequence[Any],
) -> None:
    """One of the processes; ``said`` has a pipe for the last words of each.

    The configuration comes as plain values, since a class of a plug-in can be unpickled only after ``options`` are applied.
    """
    end_with(parent)
    os.setpgid(0, 0)  # a terminal's Ctrl-C is passed on by the launching process, and does not come twice
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    words: dict[str, Any] = {"rank": number, "severed": False, "trace": ""}
    try:
        with Signals() as signals:
            options.apply()
            work(strict.build(strict.Composed(settings, {})), folder, signals)
        return
    except Interrupted as stop:
        words |= {"code": CODE, "lines": [stop.name, stop.saved]}
    except FinetuneError as error:
        lines = list(error.faults) if isinstance(error, ConfigError) else [visible(str(error))]
        words |= {"code": error.exit_code, "lines": lines, "severed": isinstance(error, Severed)}
    except Exception as error:
        words |= {
            "code": 1,
            "lines": [visible(f"{type(error).__name__}: {error}")],
            "trace": traceback.format_exc()[-8000:],
        }
    said[number].send(words | {"at": time.monotonic()})
    sys.stderr.flush()
    os._exit(words["code"])  # not by way of destructors, which would wait for the others
