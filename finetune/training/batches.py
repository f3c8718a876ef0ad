"""Which examples make which step: a function of seed and step, so that there is no position to save."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.encode import Batch, collate
from ..system.signals import outlive

START = 16  # examples a step before "auto" has found how many fit


def chosen(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the global batch of ``step``: each epoch is a new permutation, its last batch as small as it comes."""
    per_epoch = -(-size // batch_size)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(
        hash((seed, epoch)) % 2**63
    )  # hashes of integers do not vary between processes
    return torch.randperm(size, generator=generator)[place * batch_size : (place + 1) * batch_size]


def pieces(batch: Tensor, micro_batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This process's micro-batches; every process gets as many, perhaps empty ones last."""
    most = math.ceil(len(batch) / world)
    rounds = math.ceil(most / micro_batch_size)
    mine = batch[rank::world]
    return [mine[r * micro_batch_size : (r + 1) * micro_batch_size].tolist() for r in range(rounds)]


class Batches:
    """The micro-batches of every step; ``None`` where this process has no example left in the step.

    ``batch_size`` "auto" is ``START`` until somebody sets it. Both sizes may be changed at any time, and count from the next step on.
    """

    def __init__(
        self,
        data: Dataset[dict[str, object]],
        batch_size: int | Literal["auto"],
        micro_batch_size: int | None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self.data, self.seed, self.workers = data, seed, workers
        self.batch_size = START if batch_size == "auto" else batch_size
        self.micro_batch_size = micro_batch_size
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.data)  # type: ignore[arg-type]  # torch's Dataset declares no length

    @property
    def largest(self) -> int:
        """Examples in the largest micro-batch of a process."""
        most = math.ceil(self.batch_size / self.world)
        return min(self.micro_batch_size or most, most)

    def stand_in(self) -> Batch:
        """One example, for a process that has none in a step but must run the model as the others do."""
        return collate([self.data[0]])

    def longest(self, count: int) -> Batch:
        """The ``count`` examples that take the most memory."""
        places = range(len(self))
        if "input_ids" in self.data[0]:
            lengths = [len(cast(list[int], self.data[i]["input_ids"])) for i in places]
            places = sorted(places, key=lambda i: -lengths[i])  # type: ignore[assignment]  # a list serves as well
        return collate([self.data[i] for i in places[:count]])

    def _plan(self, start: int, end: int) -> list[list[list[int]]]:
        micro = self.micro_batch_size or self.batch_size
        return [
            pieces(chosen(len(self), self.batch_size, self.seed, step), micro, self.rank, self.world)
            for step in range(start, end)
        ]

    def steps(self, start: int, end: int) -> Iterator[list[Batch | None]]:
        """One list of micro-batches a step."""
        while start < end:
            sizes = self.batch_size, self.micro_batch_size
            for micro in self._stream(start, end):
                start += 1
                yield micro
                if sizes != (self.batch_size, self.micro_batch_size):
                    break

    def _stream(self, start: int, end: int) -> Iterator[list[Batch | None]]:
        """The steps at the sizes of now."""
        plan = self._plan(start, end)
        wanted = [piece for step in plan for piece in step if piece]
        # a generator of its own: otherwise the loader draws from the global one, and a resumed run would go on with other numbers
        options: Any = {
            "collate_fn": collate,
            "num_workers": self.workers,
            "worker_init_fn": outlive,
            "generator": torch.Generator(),
        }
        loader = iter(DataLoader(self.data, batch_sampler=wanted, **options))
        for step in plan:
            yield [next(loader) if piece else None for piece in step]
