"""What is done when memory runs out: the micro-batch halves, and the work is done again from the same random numbers.

The global batch, the loss and the seeds stay as they are. A run that runs out of memory in its first step ends as one that was started with the
smaller micro-batch, to the bit; what was done before with the larger one differs from it by rounding, and by what dropout drew.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..core.collective import BrokenOff, anyone, break_off, meet
from ..core.part import patched
from ..core.state import state_modules
from ..errors import RunFailed
from ..storage.result import peak_memory

if TYPE_CHECKING:
    from .session import Session

T = TypeVar("T")
WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
MOST = 512  # examples, where the batch size is to be found
ADVICE = "Take a smaller model or method, train.precision=bf16, shorter examples, or a GPU with more memory."


def ran_out(error: BaseException) -> bool:
    """Whether torch, its libraries or numpy found no memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def put_back(model: nn.Module) -> None:
    """Free what memory is to be had, and take out of the weights what there was none to take out."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for layer in patched(model).values():
        for delta in reversed(layer.deltas):
            delta.restore_(layer.original.data)


def draws(session: Session) -> dict[str, Any]:
    """Where the random numbers of a step are."""
    found = {"torch": torch.get_rng_state(), "method": session.run.generator.get_state()}
    return found | ({"cuda": torch.cuda.get_rng_state()} if session.accelerator.device.type == "cuda" else {})


def redraw(session: Session, found: dict[str, Any]) -> None:
    """Go back to where the random numbers were."""
    torch.set_rng_state(found["torch"])
    session.run.generator.set_state(found["method"])
    if "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])


class Memory:
    """How many examples a session takes at once, and how it came to that. ``say`` gets a line for each change."""

    def __init__(self, session: Session) -> None:
        self.session, self.events = session, list[dict[str, int]]()
        self.say: Callable[[str], None] = lambda line: None

    def state(self) -> dict[str, Any]:
        """For checkpoints and results."""
        batches = self.session.batches
        return {
            "batch_size": batches.batch_size,
            "micro_batch_size": batches.micro_batch_size,
            "out_of_memory": list(self.events),
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on as a checkpoint says; an older one says nothing."""
        if saved:
            batches = self.session.batches
            batches.batch_size, batches.micro_batch_size, self.events = (
                saved["batch_size"],
                saved["micro_batch_size"],
                list(saved["out_of_memory"]),
            )

    def enough(self, work: Callable[[], T], again: Callable[[], None] = lambda: None) -> T:
        """What ``work`` returns. Where memory runs out on any process, all do it again in smaller pieces, after ``again``.

        Raises ``RunFailed`` when the micro-batch cannot be halved, or the work cannot be done twice.
        """
        start, revisions = draws(self.session), self._revisions()
        while True:
            try:
                found = work()
                meet()
                return found
            except BrokenOff:
                pass
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                break_off()
            self.recover()  # outside of the clause: the error holds every tensor of the stack
            if self._revisions() != revisions:
                raise RunFailed(
                    f"Memory ran out at step {self.session.number + 1} as trained entries moved, which cannot be done twice. {ADVICE}"
                )
            self._halve()
            redraw(self.session, start)
            again()

    def _revisions(self) -> list[int]:
        """Return numbers that change whenever a state changes in a way that cannot be repeated."""
        return [module.revision for module in state_modules(self.session.states)]

    def recover(self) -> None:
        """Let go of what the interrupted work held."""
        for p in self.session.states.parameters():
            p.grad = None
        put_back(self.session.model)

    def _halve(self) -> None:
        session, batches = self.session, self.session.batches
        before, step = batches.largest, session.number + 1
        if before == 1:
            raise RunFailed(f"Memory ran out at step {step} with one example at a time. {ADVICE}")
        batches.micro_batch_size = -(-before // 2)
        self.events.append({"step": step, "from": before, "to": batches.micro_batch_size})
        session.run.batch = next(batches.steps(session.number, session.number + 1))
        sizes = f"passes of {batches.micro_batch_size} examples instead of {before}"
        self.say(f"Memory ran out at step {step}: {sizes} from now on; batch and loss are the same.")

    def find(self) -> None:
        """Set the batch size, before training: the largest power of two at which one pass fits each process, or the whole data if that is less.

        The session is as it was, with its first phase not begun.
        """
        session, batches, began = self.session, self.session.batches, time.monotonic()
        most, start, before = min(MOST, len(batches)), 1, resident()
        batches.batch_size = batches.world
        while self._fits(start):
            batches.batch_size = min(start * batches.world, most)
            if start * batches.world >= most or anyone(_short(before)):
                break
            start *= 2
        else:
            if start == 1:
                raise RunFailed(f"train.batch_size=auto: not even one example fits into memory. {ADVICE}")
        session.rebuild()
        self.say(
            f"train.batch_size=auto: {batches.batch_size} examples, found in {time.monotonic() - began:.1f} s."
        )

    def _fits(self, count: int) -> bool:
        """Whether forward and backward of the ``count`` longest examples, with the optimizer's two moments, fit on all processes."""
        session = self.session
        try:
            if not session.begun:
                session.start()
            moments = [
                torch.empty_like(p) for p in session.states.parameters() if p.requires_grad for _ in range(2)
            ]
            session.try_backward(session.batches.longest(count))
            del moments
            meet()
            fits = True
        except BrokenOff:
            fits = False
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            break_off()
            fits = False
        self.recover()
        return fits


def _short(before: int) -> bool:
    """Whether twice what was taken since ``before`` might be too much; asked on the CPU, where the kernel ends what takes more than there is."""
    return not torch.cuda.is_available() and _room() < 2 * (peak_memory()[0] - before)


def resident() -> int:
    """Bytes of this process in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _room() -> int:
    """Bytes that this process may still take, by the machine and by its control group."""
    import psutil

    room, group = int(psutil.virtual_memory().available), Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        room = min(
            room, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    return room
