"""Choose the examples of each step from seed and step alone, so checkpoints need no position in the data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.encode import TRAIN, Batch, Images, Item, Tokens, collate
from ..system.signals import delay_sigterm

START = 16  # examples per step, until "auto" has found how many fit


def choose_examples(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the indices of the global batch of ``step`` (from 0) in a data set of ``size`` examples, int64.

    Each epoch is a new permutation. Its last batch holds the remaining examples.
    """
    per_epoch = -(-size // batch_size)
    epoch, place = divmod(step, per_epoch)
    # the hash of integers is the same in every process, unlike that of text
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
    return torch.randperm(size, generator=generator)[place * batch_size : (place + 1) * batch_size]


def divide_batch(batch: Tensor, micro_batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Return this process's micro-batches of a global batch.

    Every process gets the same number; if it has too few examples, its last micro-batches are empty.
    """
    most = math.ceil(len(batch) / world)
    rounds = math.ceil(most / micro_batch_size)
    ours = batch[rank::world]
    pieces = []
    for i in range(rounds):
        pieces.append(ours[i * micro_batch_size : (i + 1) * micro_batch_size].tolist())
    return pieces


def derive_seed(seed: int, stream: str) -> int:
    """Return the seed that orders the examples of a stream; that of ``TRAIN`` is the run's own."""
    if stream == TRAIN:
        return seed
    digest = hashlib.sha256(f"{seed} {stream}".encode()).digest()
    return int.from_bytes(digest[:4])


class Batches:
    """The micro-batches of every step of one process, first those of ``TRAIN``, then those of each stream.

    ``batch_size`` is that of all processes; "auto" means ``START`` until it is set. Both sizes are those of
    every stream, and may be changed at any time, with effect from the next step on. ``used``: the streams
    that steps have; the session sets those of the phase's objective.
    """

    def __init__(
        self,
        data: Images | Tokens,
        batch_size: int | Literal["auto"],
        micro_batch_size: int | None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        streams: Mapping[str, Images | Tokens] | None = None,
    ) -> None:
        self.data, self.seed, self.workers = data, seed, workers
        self.sets = {TRAIN: data, **(streams or {})}
        self.used: tuple[str, ...] = (TRAIN,)
        self._stand_ins: dict[str, Batch] = {}
        self.batch_size = START if batch_size == "auto" else batch_size
        self.micro_batch_size = micro_batch_size
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """Return how many examples there are, without those of streams."""
        return len(self.data)

    @property
    def largest(self) -> int:
        """Examples in the largest micro-batch of a process."""
        most = math.ceil(self.batch_size / self.world)
        return min(self.micro_batch_size or most, most)

    @property
    def most(self) -> int:
        """The largest batch that the training data and every stream can fill."""
        return min(len(self.sets[stream]) for stream in self.used)

    def stand_in(self, stream: str = TRAIN) -> Batch:
        """Return one example, for a process that has none in a step but must run the model like others."""
        if stream not in self._stand_ins:
            self._stand_ins[stream] = self._collate(stream, [self.sets[stream][0]])
        return self._stand_ins[stream]

    def longest(self, count: int, stream: str = TRAIN) -> Batch:
        """Return the ``count`` examples that take the most memory; for texts, those with the most tokens."""
        data = self.sets[stream]
        places = list(range(len(data)))
        if "input_ids" in data[0]:
            lengths = [len(cast(list[int], data[i]["input_ids"])) for i in places]
            places.sort(key=lengths.__getitem__, reverse=True)
        return self._collate(stream, [data[i] for i in places[:count]])

    def _collate(self, stream: str, items: Sequence[Item]) -> Batch:
        return replace(collate(items), stream=stream)

    def steps(self, start: int, end: int) -> Iterator[list[Batch | None]]:
        """Yield the micro-batches of steps ``start`` to ``end - 1``; ``None`` stands for an empty one."""
        while start < end:
            sizes = self.batch_size, self.micro_batch_size
            for parts in zip(*(self._steps_of(stream, start, end) for stream in self.used), strict=True):
                start += 1
                micro: list[Batch | None] = []
                for part in parts:
                    micro += part
                yield micro
                if sizes != (self.batch_size, self.micro_batch_size):
                    break

    def step_of(self, stream: str, step: int) -> list[Batch | None]:
        """Return the micro-batches of one step (from 0) of a stream; ``None`` stands for an empty one."""
        (pieces,) = self._plan(stream, step, step + 1)
        data = self.sets[stream]
        found: list[Batch | None] = []
        for piece in pieces:
            found.append(self._collate(stream, [data[i] for i in piece]) if piece else None)
        return found

    def _plan(self, stream: str, start: int, end: int) -> list[list[list[int]]]:
        """Return the indices of each micro-batch of each step, at the current sizes."""
        micro = self.micro_batch_size or self.batch_size
        size, seed = len(self.sets[stream]), derive_seed(self.seed, stream)
        steps = []
        for step in range(start, end):
            batch = choose_examples(size, self.batch_size, seed, step)
            steps.append(divide_batch(batch, micro, self.rank, self.world))
        return steps

    def _steps_of(self, stream: str, start: int, end: int) -> Iterator[list[Batch | None]]:
        """Yield the micro-batches of a stream in each step, at the current sizes."""
        plan = self._plan(stream, start, end)
        wanted = []
        for step in plan:
            wanted += [piece for piece in step if piece]
        options: Any = {
            "collate_fn": partial(self._collate, stream),
            "num_workers": self.workers,
            "worker_init_fn": delay_sigterm,
            # the loader would draw from the global generator, and a resumed run would get other numbers
            "generator": torch.Generator(),
        }
        loader = iter(DataLoader(self.sets[stream], batch_sampler=wanted, **options))
        for step in plan:
            yield [next(loader) if piece else None for piece in step]
