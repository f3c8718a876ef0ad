"""Hand runs to a cluster by Hydra's own launchers: joblib, submitit (Slurm), ray.

Each job runs one frozen configuration in a process. Jobs only write run folders, and results are read from
these folders, not from what the launcher reports.
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
from ..errors import ConfigError, suggest_nearest
from ..launch.start import StartOptions, child_command
from ..storage.atomic import write_json_atomic
from ..storage.run_folder import RunFolder
from ..system import safe
from ..system.environment import count_cores, cuda_devices
from .grid import Point
from .process import run_to_end, should_rerun

PLUGINS = {  # of Hydra, by name: the module, and the name of the launcher in it
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "slurm": ("hydra_submitit_launcher", "submitit_slurm"),
    "ray": ("hydra_ray_launcher", "ray"),
}
ANSWER = 10.0  # seconds that Slurm has to answer
SETTLE = 20.0  # seconds until a network file system shows what a job wrote, and Slurm requeues a lost job
INTERVAL = 2.0  # seconds between two queries to Slurm
Say = Callable[[str], None]


@dataclass(frozen=True)
class Launcher:
    """A launcher of Hydra by name, with the settings of ``launcher/NAME.yaml`` and the command line."""

    name: str
    settings: dict[str, Any]


def choose_launcher(name: str, words: Sequence[str], config_dir: Path | None = None) -> Launcher | None:
    """Return the launcher ``name`` with settings ``launcher.KEY=VALUE``, or ``None`` for local.

    Raises ``ConfigError`` for mistakes, and if the launcher cannot work on this machine.
    """
    if name not in ("local", *PLUGINS):
        raise ConfigError(
            f"--launcher {name} is not a launcher.{suggest_nearest(name, PLUGINS)} "
            f"There is: local, {', '.join(PLUGINS)}."
        )
    given = dict(word.removeprefix("launcher.").split("=", 1) for word in words)
    if name == "local":
        if given:
            raise ConfigError(
                f"{words[0]}: only --launcher {', '.join(PLUGINS)} have settings; local has --jobs."
            )
        return None
    settings = _settings(name, config_dir)
    faults = []
    for key in given:
        if key not in settings:
            faults.append(
                f"launcher.{key} is not a setting of --launcher {name}.{suggest_nearest(key, settings)}"
            )
    faults += _missing(name)
    if faults:
        raise ConfigError(*faults)
    return Launcher(name, settings | {key: yaml.safe_load(value) for key, value in given.items()})


def _settings(name: str, config_dir: Path | None) -> dict[str, Any]:
    """Return the settings in the user's ``launcher/NAME.yaml``, or else in the built-in file."""
    file = conf_dir() / "launcher" / f"{name}.yaml"
    if config_dir and (config_dir / "launcher" / f"{name}.yaml").is_file():
        file = config_dir / "launcher" / f"{name}.yaml"
    try:
        stated = safe.read_yaml(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(stated, dict):
        raise ConfigError(f"{file} should be a mapping of settings of the launcher.")
    return stated


def _missing(name: str) -> list[str]:
    """Return what a launcher lacks on this machine: a package, or Slurm's tools; empty if nothing."""
    plugin = f"hydra_plugins.{PLUGINS[name][0]}"
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(plugin) is None:
        return [
            f"--launcher {name} needs a package that is not installed: pip install 'finetune-bench[{name}]'"
        ]
    if name != "slurm":
        return []
    missing = [tool for tool in ("sbatch", "sinfo", "squeue") if shutil.which(tool) is None]
    if missing:
        return [
            f"--launcher slurm needs Slurm's {', '.join(missing)}, not found here. Start from a login node, "
            "or use --launcher local."
        ]
    cure = "See `sinfo`, or use --launcher local."
    try:
        done = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=ANSWER)
    except subprocess.TimeoutExpired:
        return [f"--launcher slurm: Slurm did not answer `sinfo` within {ANSWER:.0f} s. {cure}"]
    if done.returncode == 0:
        return []
    message = " ".join((done.stderr or done.stdout).split())
    return [f"--launcher slurm: `sinfo` fails: {message}. {cure}"]


def run_all(
    runs: Sequence[Point], launcher: Launcher, jobs: int | None, retry: bool, say: Say, options: StartOptions
) -> dict[Path, dict[str, Any]]:
    """Run the unfinished points by ``launcher``, wait for all jobs, and return the results by folder.

    A job that died is not an error here: its run has no result.
    """
    todo = [point for point in runs if not _is_kept(point, retry)]
    say(f"{len(runs) - len(todo)} of {len(runs)} runs are there already; {len(todo)} go to {launcher.name}.")
    if todo:
        for point in todo:
            point.folder.result.unlink(missing_ok=True)  # of an earlier failure
        home = runs[0].folder.path.parent / ".launcher" / time.strftime("%Y%m%d-%H%M%S")
        _submit(todo, launcher, jobs, home, say, options)
    ended = [point.folder for point in runs if point.folder.result.is_file()]
    return {folder.path: folder.read_result() for folder in ended}


def _is_kept(point: Point, retry: bool) -> bool:
    """Tell whether a point has a result that stays: finished, or failed and not to be run again."""
    if not point.folder.result.is_file():
        return False
    result = point.folder.read_result()
    return result["status"] == "finished" or not (retry or should_rerun(result))


def _submit(
    todo: Sequence[Point], launcher: Launcher, jobs: int | None, home: Path, say: Say, options: StartOptions
) -> None:
    """Start Hydra's launcher in a process of its own that logs to a file; wait until all jobs have ended."""
    settings = dict(launcher.settings)
    threads = settings.get("cpus_per_task") or 0
    if launcher.name == "joblib":
        parallel = jobs or count_cores()
        settings["n_jobs"] = parallel
        threads = max(1, count_cores() // parallel)
    order = {
        "launcher": PLUGINS[launcher.name][1],
        "settings": settings,
        "threads": threads,
        "gpus": launcher.name == "joblib",
        "options": options.to_json(),
        "home": str(home),
        "files": [str(point.folder.config) for point in todo],
    }
    write_json_atomic(home / "jobs.json", order)
    log = home / "log.txt"
    command = child_command(f"{__package__}.jobs", options, str(home / "jobs.json"))
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
        )
    try:
        _wait(process, todo, home if launcher.name == "slurm" else None)
    except KeyboardInterrupt:
        if numbers := _slurm_jobs(home):
            say(f"Slurm continues the jobs {', '.join(numbers)}; to end them: scancel {' '.join(numbers)}")
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if not _all_ended(todo):
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1][:300] if lines else "nothing"
        say(f"Warning: not all jobs of {launcher.name} ended with a result; {log} ends with: {last}")


def _all_ended(points: Sequence[Point]) -> bool:
    return all(point.folder.result.is_file() for point in points)


def _wait(process: subprocess.Popen[bytes], todo: Sequence[Point], home: Path | None) -> None:
    """Wait until the launcher ends or all points have results.

    ``home`` is the folder of Slurm's jobs. If it is given, wait at most ``SETTLE`` seconds after Slurm has
    lost the jobs: the launcher itself would wait for a dead job without end.
    """
    lost_since: float | None = None
    while process.poll() is None and not _all_ended(todo):
        numbers = _slurm_jobs(home) if home else []
        if not numbers or _is_queued(numbers):
            lost_since = None
        elif lost_since is None:
            lost_since = time.monotonic()
        elif time.monotonic() - lost_since > SETTLE:
            return
        time.sleep(INTERVAL if home else 0.2)
    with suppress(subprocess.TimeoutExpired):
        process.wait(SETTLE)


def _slurm_jobs(home: Path) -> list[str]:
    """Return the numbers of Slurm's jobs whose files submitit keeps in ``home``."""
    numbers = set()
    for folder in (home / ".submitit").glob("*"):
        number = folder.name.split("_")[0]
        if number.isdigit():
            numbers.add(number)
    return sorted(numbers)


def _is_queued(numbers: Sequence[str]) -> bool:
    """Tell whether any of the jobs waits or runs in Slurm; true if Slurm does not answer."""
    done = subprocess.run(
        ["squeue", "-h", "-o", "%A", "-j", ",".join(numbers)], capture_output=True, text=True
    )
    return bool(done.stdout.strip()) or (done.returncode != 0 and "Invalid job id" not in done.stderr)


def job(config: Any) -> str:
    """Do what a job of the cluster does: run the configuration in ``config.file``, and return its status.

    A failed run raises nothing.
    """
    options = StartOptions.from_json(config.options)
    options.apply()
    file = Path(config.file)
    loaded = load([], config_file=file)
    point = Point(loaded.method.name, loaded, RunFolder(file.parent))
    threads = config.threads or None
    if not config.gpus:
        return str(run_to_end(point, options, threads)["status"])
    with _free_gpu(Path(config.home)) as device:
        return str(run_to_end(point, options, threads, device)["status"])


@contextmanager
def _free_gpu(home: Path) -> Iterator[str | None]:
    """Wait for a GPU that no other job of this sweep uses on this machine; ``None`` if it has none."""
    names = cuda_devices()
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
