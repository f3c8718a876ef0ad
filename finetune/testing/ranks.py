"""Run a test script in several processes that train together on the CPU, and compare what they store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..training.session import Session

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


def record(session: Session) -> dict[str, Tensor]:
    """Train to the end; return the loss of each step and what the run ends with."""
    kept = {}
    for step in session.steps():
        kept[f"loss {step.number}"] = torch.tensor(step.loss)
    for name, tensor in session.states.state_dict().items():
        kept[name] = tensor.contiguous()
    return kept


def check_agreement(script: str, folder: Path, alone: dict[str, Tensor]) -> None:
    """Raise ``AssertionError`` unless two ranks store the same bits, and nearly the values of one process.

    ``script``: as in ``run``. ``alone``: what the script stores if it runs in one process.
    """
    first, second = run(script, folder)
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=1e-3, msg=name)
