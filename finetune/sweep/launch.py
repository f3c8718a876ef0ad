"""Runs handed to a cluster by Hydra's own launchers: joblib, submitit (Slurm), ray. Each job runs one frozen configuration in a process.

Jobs only write run folders, so what became of them is read from there, whatever the launcher says.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config.load import conf_dir, load
from ..errors import ConfigError, near
from ..launch.start import StartOptions, child_command
from ..storage.atomic import write_json_atomic
from ..storage.run_folder import RunFolder
from ..system import safe
from ..system.environment import cores
from .grid import Point
from .pool import devices
from .process import again, run_to_end

PLUGINS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "slurm": ("hydra_submitit_launcher", "submitit_slurm"),
    "ray": ("hydra_ray_launcher", "ray"),
}
ANSWER = 10.0  # seconds that Slurm has to answer
SETTLE = (
    20.0  # seconds for a network file system to show what a job wrote, and for Slurm to queue a job again
)
LOOK = 2.0  # seconds between two questions to Slurm
Say = Callable[[str], None]


@dataclass(frozen=True)
class Launcher:
    """Which one, and its settings: those of ``launcher/NAME.yaml`` with what the command line changes."""

    name: str
    settings: dict[str, Any]


def launcher(name: str, words: Sequence[str], config_dir: Path | None = None) -> Launcher | None:
    """The launcher ``name`` with settings ``launcher.KEY=VALUE``; ``None`` for local. Raises ``ConfigError``, also when it cannot work here."""
    if name not in ("local", *PLUGINS):
        raise ConfigError(
            f"--launcher {name} is not a launcher.{near(name, PLUGINS)} There is: local, {', '.join(PLUGINS)}."
        )
    given = dict(word.removeprefix("launcher.").split("=", 1) for word in words)
    if name == "local":
        if given:
            raise ConfigError(
                f"{words[0]}: only --launcher {', '.join(PLUGINS)} have settings; local has --jobs."
            )
        return None
    settings = _settings(name, config_dir)
    unknown = [
        f"launcher.{key} is not a setting of --launcher {name}.{near(key, settings)}"
        for key in given
        if key not in settings
    ]
    if faults := [*unknown, *_absent(name)]:
        raise ConfigError(*faults)
    return Launcher(name, settings | {key: yaml.safe_load(value) for key, value in given.items()})


def _settings(name: str, config_dir: Path | None) -> dict[str, Any]:
    places = [folder / "launcher" / f"{name}.yaml" for folder in (config_dir, conf_dir()) if folder]
    file = next(place for place in places if place.is_file())
    try:
        stated = safe.read_yaml(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(stated, dict):
        raise ConfigError(f"{file} should be a mapping of settings of the launcher.")
    return stated


def _absent(name: str) -> list[str]:
    """Why a launcher cannot work here; empty if it can."""
    if (
        importlib.util.find_spec("hydra_plugins") is None
        or importlib.util.find_spec(f"hydra_plugins.{PLUGINS[name][0]}") is None
    ):
        return [
            f"--launcher {name} needs a package that is not installed: pip install 'finetune-bench[{name}]'"
        ]
    if name != "slurm":
        return []
    missing = [tool for tool in ("sbatch", "sinfo", "squeue") if shutil.which(tool) is None]
    if missing:
        return [
            f"--launcher slurm needs Slurm's {', '.join(missing)}, not found here. Start from a login node, or use --launcher local."
        ]
    cure = "See `sinfo`, or use --launcher local."
    try:
        done = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=ANSWER)
    except subprocess.TimeoutExpired:
        return [f"--launcher slurm: Slurm did not answer `sinfo` within {ANSWER:.0f} s. {cure}"]
    said = " ".join((done.stderr or done.stdout).split())
    return [f"--launcher slurm: `sinfo` fails: {said}. {cure}"] if done.returncode else []


def run_all(
    runs: Sequence[Point], where: Launcher, jobs: int | None, retry: bool, say: Say, options: StartOptions
) -> dict[Path, dict[str, Any]]:
    """Run by ``where`` what is not finished, wait for all of it, and return the results that there are by folder. A job's death is no error here."""
    todo = [point for point in runs if not _kept(point, retry)]
    say(f"{len(runs) - len(todo)} of {len(runs)} runs are there already; {len(todo)} go to {where.name}.")
    if todo:
        for point in todo:
            point.folder.result.unlink(missing_ok=True)  # of an earlier failure
        home = runs[0].folder.path.parent / ".launcher" / time.strftime("%Y%m%d-%H%M%S")
        _submit(todo, where, jobs, home, say, options)
    return {point.folder.path: point.folder.read_result() for point in runs if point.folder.result.is_file()}


def _kept(point: Point, retry: bool) -> bool:
    if not point.folder.result.is_file():
        return False
    result = point.folder.read_result()
    return result["status"] == "finished" or not (retry or again(result))


def _submit(
    todo: Sequence[Point], where: Launcher, jobs: int | None, home: Path, say: Say, options: StartOptions
) -> None:
    """Start Hydra's launcher in a process of its own, whose words go to a file, and wait until every job has ended."""
    parallel, settings, threads = (
        jobs or cores(),
        dict(where.settings),
        where.settings.get("cpus_per_task") or 0,
    )
    if where.name == "joblib":
        settings, threads = settings | {"n_jobs": parallel}, max(1, cores() // parallel)
    about = {
        "launcher": PLUGINS[where.name][1],
        "settings": settings,
        "threads": threads,
        "gpus": where.name == "joblib",
        "options": options.to_json(),
    }
    told = about | {"home": str(home), "files": [str(point.folder.config) for point in todo]}
    write_json_atomic(home / "jobs.json", told)
    with (home / "log.txt").open("wb") as log:
        words = child_command(f"{__package__}.jobs", options, str(home / "jobs.json"))
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
    try:
        _wait(process, todo, home if where.name == "slurm" else None)
    except KeyboardInterrupt:
        if numbers := _numbers(home):
            say(f"Slurm goes on with the jobs {', '.join(numbers)}; to end them: scancel {' '.join(numbers)}")
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if any(not point.folder.result.is_file() for point in todo):
        lines = [
            line
            for line in (home / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
        say(
            f"Warning: not all jobs of {where.name} ended with a result; {home / 'log.txt'} ends with: {lines[-1][:300] if lines else 'nothing'}"
        )


def _wait(process: subprocess.Popen[bytes], todo: Sequence[Point], home: Path | None) -> None:
    """Until the launcher ends, or all have results; with ``home``, which Slurm's jobs have, also until Slurm has had none of them for a while."""
    gone: float | None = None
    while process.poll() is None and any(not point.folder.result.is_file() for point in todo):
        if home and _numbers(home) and not _queued(_numbers(home)):
            gone = gone or time.monotonic()
            if time.monotonic() - gone > SETTLE:  # a job that died leaves nothing that the launcher waits for
                return
        else:
            gone = None
        time.sleep(LOOK if home else 0.2)
    with suppress(subprocess.TimeoutExpired):
        process.wait(SETTLE)


def _numbers(home: Path) -> list[str]:
    """The numbers of Slurm's jobs whose files submitit keeps in ``home``."""
    return sorted(
        {
            folder.name.split("_")[0]
            for folder in (home / ".submitit").glob("*")
            if folder.name.split("_")[0].isdigit()
        }
    )


def _queued(numbers: Sequence[str]) -> bool:
    """Whether Slurm has any of the jobs, waiting or running; also when it does not say."""
    done = subprocess.run(
        ["squeue", "-h", "-o", "%A", "-j", ",".join(numbers)], capture_output=True, text=True
    )
    return bool(done.stdout.strip()) or (done.returncode != 0 and "Invalid job id" not in done.stderr)


def job(config: Any) -> str:
    """What a job does: run the configuration in ``config.file`` to its end, here, and say what became of it. Never raises for a failed run."""
    options, file = StartOptions.from_json(config.options), Path(config.file)
    options.apply()
    loaded = load([], config_file=file)
    point = Point(loaded.method.name, loaded, RunFolder(file.parent))
    with _gpu(Path(config.home)) if config.gpus else _none() as device:
        return str(run_to_end(point, options, config.threads or None, device)["status"])


@contextmanager
def _none() -> Iterator[str | None]:
    yield None


@contextmanager
def _gpu(home: Path) -> Iterator[str | None]:
    """A GPU that no other job of this sweep on this machine has; ``None`` if there are none at all."""
    names = devices()
    home.mkdir(parents=True, exist_ok=True)
    while names:
        for name in names:
            handle = os.open(home / f"gpu-{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield name
                return
            except BlockingIOError:
                continue
            finally:
                os.close(handle)
        time.sleep(0.2)
    yield None
