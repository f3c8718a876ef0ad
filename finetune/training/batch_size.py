"""Find the batch size for ``train.batch_size=auto``, before training."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import torch

from ..core.collective import Aborted, abort, any_process, barrier
from ..errors import RunFailed
from ..storage.result import peak_memory
from .memory import ADVICE, ran_out
from .session import Session

LARGEST = 512  # examples
CGROUP = Path("/sys/fs/cgroup")


def find_batch_size(session: Session) -> None:
    """Set the batch size to the most examples that fit into one pass, a power of two for each process.

    The processes together have at most ``LARGEST`` examples, or all that there are. The session is left as it
    was, before the start of its first phase. Raises ``RunFailed`` if not even one example fits.
    """
    batches, began = session.batches, time.monotonic()
    most, size, before = min(LARGEST, batches.most), 1, resident_bytes()
    batches.batch_size = batches.world
    while _fits(session, size):
        batches.batch_size = min(size * batches.world, most)
        if size * batches.world >= most or any_process(_may_run_short(before)):
            break
        size *= 2
    else:
        if size == 1:
            raise RunFailed(f"train.batch_size=auto: not even one example fits into memory. {ADVICE}")
    session.rebuild()
    seconds = time.monotonic() - began
    session.memory.say(f"train.batch_size=auto: {batches.batch_size} examples, found in {seconds:.1f} s.")


def _fits(session: Session, count: int) -> bool:
    """Try a pass over the ``count`` longest examples of every stream on all processes.

    If training needs gradients, two empty tensors a trained parameter stand for the optimizer's moments.
    """
    try:
        if not session.begun:
            session.start()
        batches = [session.batches.longest(count, stream) for stream in session.batches.used]
        if session.recipe.optimizer.needs_grad:
            moments = []
            for parameter in session.states.parameters():
                if parameter.requires_grad:
                    moments += [torch.empty_like(parameter), torch.empty_like(parameter)]
            for batch in batches:
                session.compute.try_backward(batch)
            del moments
        else:
            session.compute.try_forward(batches)
        barrier()
        fits = True
    except Aborted:
        fits = False
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        abort()
        fits = False
    session.memory.recover()
    return fits


def _may_run_short(before: int) -> bool:
    """Return whether twice the memory taken since ``before`` (bytes) may be too much for the CPU.

    On a CPU this must not be tried: the kernel kills a process that takes more memory than there is.
    """
    return not torch.cuda.is_available() and _free_bytes() < 2 * (peak_memory()[0] - before)


def resident_bytes() -> int:
    """Return the bytes of memory that this process uses now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _free_bytes() -> int:
    """Return the bytes that this process may still take within the limits of machine and control group."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        free = min(free, limit - int((CGROUP / "memory.current").read_text()))
    return free
