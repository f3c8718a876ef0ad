"""Run a test script in several processes that train together on the CPU, and read what each has stored."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

LIMIT = 600  # seconds; if one process misses a collective, the others would wait forever


def run(script: str, folder: Path, world: int = 2) -> list[dict[str, Tensor]]:
    """Start ``python SCRIPT FILE`` in ``world`` processes and return the tensors that each stored in its
    FILE.

    Raises ``AssertionError`` if one of them fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    files = [folder / f"{rank}-of-{world}.safetensors" for rank in range(world)]
    started = []
    for rank, file in enumerate(files):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, script, str(file)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
    try:
        said = [process.communicate(timeout=LIMIT)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), said
    return [load_file(file) for file in files]
