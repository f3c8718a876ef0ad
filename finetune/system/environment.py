"""What the environment says of this process: its rank, its cores, and the launcher's settings. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}  # fmt: skip


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # there is no such function on macOS and Windows
        return os.cpu_count() or 1


def rank() -> int:
    """The number of this process, 0 where there is no other."""
    return int(os.environ.get("RANK", "0"))


def sharding(environ: Mapping[str, str]) -> list[str]:
    """Why the launcher's settings cannot be followed."""
    return [
        f"{name}={environ[name]}: {what} splits the base's weights, and changes are chosen in, written into and merged with whole ones. "
        "Launch with plain data parallelism: `finetune train --processes N`, or `accelerate launch` with a configuration without it."
        for name, what in SHARDED.items()
        if environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")
    ]
