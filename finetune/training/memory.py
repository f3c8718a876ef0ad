"""Retry when memory runs out: halve the micro-batch, and repeat the work with the same random numbers.

The global batch, the loss and the seeds stay as they are. A run that runs out of memory in its first step
ends with the same bits as one started with the smaller micro-batch. If it runs out of memory later, the steps
before, done with the larger micro-batch, differ by rounding and by the numbers that dropout drew.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..core.attach import patched
from ..core.collective import Aborted, abort, barrier
from ..core.method import Run
from ..core.state import state_modules
from ..errors import RunFailed
from ..storage.progress import BatchRecord, Halving
from .batches import Batches

T = TypeVar("T")
MESSAGES = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
ADVICE = "Take a smaller model or method, train.precision=bf16, shorter examples, or a GPU with more memory."


class Retried(Protocol):
    """The part of a session that retrying needs."""

    number: int
    model: nn.Module
    states: nn.ModuleDict
    batches: Batches
    run: Run


def ran_out(error: BaseException) -> bool:
    """Return whether an error of torch, its libraries or numpy means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def release_memory(model: nn.Module) -> None:
    """Free cached memory, and take out the changes that an interrupted pass left inside the weights."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for layer in patched(model).values():
        for delta in reversed(layer.deltas):
            delta.restore_(layer.original.data)


def rng_snapshot(generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """Return the state of the generators that a step draws from: torch's, ``device``'s, and the method's."""
    found = {"torch": torch.get_rng_state(), "method": generator.get_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def rng_restore(generator: torch.Generator, snapshot: dict[str, Tensor]) -> None:
    """Set the generators to the state of a snapshot."""
    torch.set_rng_state(snapshot["torch"])
    generator.set_state(snapshot["method"])
    if "cuda" in snapshot:
        torch.cuda.set_rng_state(snapshot["cuda"])


class Memory:
    """The sizes of a session's batches. When memory runs out, halve the micro-batch and tell ``say``."""

    def __init__(self, session: Retried, device: torch.device) -> None:
        self.session, self.device = session, device
        self.halvings: list[Halving] = []
        self.say: Callable[[str], None] = lambda line: None

    def record(self) -> BatchRecord:
        """Return the sizes and the halvings for checkpoints and results."""
        batches = self.session.batches
        return BatchRecord(batches.batch_size, batches.micro_batch_size, list(self.halvings))

    def restore(self, record: BatchRecord | None) -> None:
        """Restore the sizes of a checkpoint; the first checkpoints have none."""
        if record is None:
            return
        batches = self.session.batches
        batches.batch_size, batches.micro_batch_size = record.batch_size, record.micro_batch_size
        self.halvings = list(record.out_of_memory)

    def retry_smaller(self, work: Callable[[], T], prepare_retry: Callable[[], None] | None = None) -> T:
        """Return the result of ``work``; if any process runs out of memory, halve the micro-batch and retry.

        ``prepare_retry`` is called before each retry. Raises ``RunFailed`` if the micro-batch cannot be
        halved, or if ``work`` has already made a change that cannot be repeated.
        """
        generator = self.session.run.generator
        snapshot, revisions = rng_snapshot(generator, self.device), self._revisions()
        while True:
            try:
                found = work()
                barrier()
                return found
            except Aborted:
                pass
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                abort()
            self.recover()  # outside the except clause: the error keeps every tensor of its stack alive
            if self._revisions() != revisions:
                raise RunFailed(
                    f"Memory ran out at step {self.session.number + 1} while other entries were being "
                    f"chosen for training, and this step cannot be repeated. {ADVICE}"
                )
            self._halve()
            rng_restore(generator, snapshot)
            if prepare_retry is not None:
                prepare_retry()

    def _revisions(self) -> list[int]:
        """Return numbers that change whenever a state changes in a way that cannot be repeated."""
        return [module.revision for module in state_modules(self.session.states)]

    def recover(self) -> None:
        """Release what interrupted work left behind: gradients, cached memory, changes inside weights."""
        for parameter in self.session.states.parameters():
            parameter.grad = None
        release_memory(self.session.model)

    def _halve(self) -> None:
        session, batches = self.session, self.session.batches
        before, step = batches.largest, session.number + 1
        if before == 1:
            raise RunFailed(f"Memory ran out at step {step} with one example at a time. {ADVICE}")
        batches.micro_batch_size = -(-before // 2)
        self.halvings.append({"step": step, "from": before, "to": batches.micro_batch_size})
        session.run.batch = next(batches.steps(session.number, session.number + 1))
        self.say(
            f"Memory ran out at step {step}: passes of {batches.micro_batch_size} examples "
            f"instead of {before} from now on; batch and loss are the same."
        )
