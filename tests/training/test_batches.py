"""Check that the batches of a step follow from the seed and the step alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.testing.sessions import examples
from finetune.training.batches import Batches, choose_examples, divide_batch


def test_every_example_once_an_epoch_and_the_last_batch_is_small() -> None:
    for epoch in range(3):
        batches = [choose_examples(21, 8, seed=0, step=3 * epoch + i) for i in range(3)]
        assert [len(b) for b in batches] == [8, 8, 5]
        assert sorted(torch.cat(batches).tolist()) == list(range(21))
    assert not torch.equal(choose_examples(21, 8, 0, 0), choose_examples(21, 8, 0, 3))
    assert not torch.equal(choose_examples(21, 8, 0, 0), choose_examples(21, 8, 1, 0))


@pytest.mark.parametrize(("size", "micro", "world"), [(8, 3, 1), (5, 8, 1), (7, 2, 2), (1, 4, 3), (9, 2, 4)])
def test_pieces_cover_the_batch_over_all_processes_in_as_many_rounds(
    size: int, micro: int, world: int
) -> None:
    batch = torch.randperm(size)
    plans = [divide_batch(batch, micro, rank, world) for rank in range(world)]
    assert sorted(i for plan in plans for piece in plan for i in piece) == sorted(batch.tolist())
    assert len({len(plan) for plan in plans}) == 1
    assert max(len(piece) for plan in plans for piece in plan) <= micro


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_starting_later_gives_the_rest_and_draws_nothing_from_the_global_generator(workers: int) -> None:
    def ids(start: int) -> list[list[list[str]]]:
        data: Any = examples()  # a list serves as a data set
        batches = Batches(data, 8, 3, seed=2, workers=workers)
        return [[b.ids for b in micro if b] for micro in batches.steps(start, 5)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert ids(0)[2:] == ids(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(piece) for piece in ids(0)[2]] == [3, 2]
