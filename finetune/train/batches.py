"""Which examples make which step: a function of seed and step, so that there is no position to save."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.encode import Batch, collate


def chosen(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the global batch of ``step``: each epoch is a new permutation, its last batch as small as it comes."""
    per_epoch = -(-size // batch_size)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)  # hashes of integers do not vary between processes
    return torch.randperm(size, generator=generator)[place * batch_size : (place + 1) * batch_size]


def pieces(batch: Tensor, micro_batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This process's micro-batches; every process gets as many, perhaps empty ones last."""
    most = math.ceil(len(batch) / world)
    rounds = math.ceil(most / micro_batch_size)
    mine = batch[rank::world]
    return [mine[r * micro_batch_size : (r + 1) * micro_batch_size].tolist() for r in range(rounds)]


class Batches:
    """The micro-batches of every step from ``start`` on; ``None`` where this process has no example left in the step."""

    def __init__(
        self,
        data: Dataset[dict[str, object]],
        batch_size: int,
        micro_batch_size: int | None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self.data, self.batch_size, self.seed, self.workers = data, batch_size, seed, workers
        self.micro_batch_size = micro_batch_size or batch_size
        self.rank, self.world = rank, world

    def _plan(self, start: int, end: int) -> list[list[list[int]]]:
        size = len(self.data)  # type: ignore[arg-type]  # torch's Dataset declares no length
        return [pieces(chosen(size, self.batch_size, self.seed, step), self.micro_batch_size, self.rank, self.world) for step in range(start, end)]

    def steps(self, start: int, end: int) -> Iterator[list[Batch | None]]:
        """One list of micro-batches a step."""
        plan = self._plan(start, end)
        wanted = [piece for step in plan for piece in step if piece]
        # a generator of its own: otherwise the loader draws from the global one, and a resumed run would go on with other numbers
        loader = iter(DataLoader(self.data, batch_sampler=wanted, collate_fn=collate, num_workers=self.workers, generator=torch.Generator()))
        for step in plan:
            yield [next(loader) if piece else None for piece in step]
