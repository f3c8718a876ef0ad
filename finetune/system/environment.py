"""Read this process's environment: rank, CPU cores, CUDA devices, launcher settings. Imports no torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
ANSWER = 10.0  # seconds that nvidia-smi has to answer


def rank() -> int:
    """Return the number of this process among those that train together; 0 if it trains alone."""
    return int(os.environ.get("RANK", "0"))


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows lack this function
        return os.cpu_count() or 1


def cuda_devices() -> list[str]:
    """Return the CUDA devices in CUDA_VISIBLE_DEVICES, or else all that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in _ask_nvidia_smi("index")]
    names = [name.strip() for name in visible.split(",")]
    return [name for name in names if name not in ("", "-1")]


def cuda_memory() -> list[int]:
    """Return the memory of each CUDA device in bytes; empty where there is none."""
    return [mebibytes * 2**20 for mebibytes in _ask_nvidia_smi("memory.total")]


def _ask_nvidia_smi(what: str) -> list[int]:
    """Return one whole number for each GPU; empty where nvidia-smi is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
    except (OSError, subprocess.SubprocessError):
        return []
    if done.returncode != 0:
        return []
    return [int(line) for line in done.stdout.splitlines() if line.strip().isdigit()]


def child_environment(threads: int | None, device: str | None) -> dict[str, str]:
    """Return the environment variables of a child with at most ``threads`` threads and the given ``device``.

    ``device`` is the value of CUDA_VISIBLE_DEVICES. A lower number of threads that the user has set stays.
    ``None`` leaves threads or devices as they are here.
    """
    made = dict(os.environ)
    if threads is not None:
        for name in THREADS:
            given = made.get(name, "")
            wanted = int(given) if given.isdigit() else 0
            made[name] = str(min(threads, wanted) if wanted else threads)
        # Threads that spin while they wait slow two processes on the same cores tenfold.
        made.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if device is not None:
        made["CUDA_VISIBLE_DEVICES"] = device
    return made


def sharding_faults(environ: Mapping[str, str]) -> list[str]:
    """Return a fault for each launcher setting in ``environ`` that would shard the base's weights."""
    faults = []
    for name, what in SHARDED.items():
        value = environ.get(name, "")
        if value.lower() in ("1", "true", "yes", "y", "on", "t"):
            faults.append(
                f"{name}={value}: {what} splits the base's weights, but choosing, applying and merging "
                "changes needs whole weights. Launch with plain data parallelism: `finetune train "
                f"--processes N`, or `accelerate launch` with a configuration without {what}."
            )
    return faults
