"""Wanda: its formula, the invariants of its score, and the checks of every pass."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from finetune.core.site import Site
from finetune.core.statistics import SiteStatistics
from finetune.passes.magnitude import Magnitude
from finetune.passes.wanda import Wanda
from finetune.testing.passes import check_pass


def site_of(weight: Tensor) -> Site:
    rows, cols = weight.shape
    return Site("layer", nn.Linear(cols, rows), 0, "q", (rows, cols))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(x: Tensor) -> SiteStatistics:
    return SiteStatistics(len(x), {"input_squares": (x**2).sum(0)})


def prune(weight: Tensor, x: Tensor, **settings: object) -> Tensor:
    method = Wanda(**{"sparsity": 0.5, **settings})  # type: ignore[arg-type]
    return method.tensor(site_of(weight), weight, statistics_of(x)).weight


def released(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """Return what the formula of the paper gives, entry by entry."""
    new = weight.clone()
    for row in range(weight.shape[0]):
        scores = [abs(weight[row, j].item()) * x[:, j].norm().item() for j in range(weight.shape[1])]
        order = sorted(range(len(scores)), key=lambda j: scores[j])
        for j in order[: int(len(scores) * sparsity)]:
            new[row, j] = 0
    return new


def test_the_formula() -> None:
    weight, x = random(5, 9), random(40, 9, seed=1) * torch.arange(1, 10)
    for sparsity in (0.0, 0.4, 0.5, 0.9):
        assert torch.equal(prune(weight, x, sparsity=sparsity), released(weight, x, sparsity))


def test_inputs_of_equal_norm_give_magnitude_by_row() -> None:
    weight = random(4, 6)
    x = torch.eye(6, dtype=torch.float64) * 3
    expected = Magnitude(sparsity=0.5, scope="row").tensor(site_of(weight), weight, None).weight
    assert torch.equal(prune(weight, x), expected)


def test_moving_a_scale_between_input_and_weight_keeps_the_mask() -> None:
    weight, x = random(4, 6), random(30, 6, seed=1)
    moved_weight, moved_x = weight.clone(), x.clone()
    moved_weight[:, 2] /= 8
    moved_x[:, 2] *= 8
    assert torch.equal(prune(weight, x) == 0, prune(moved_weight, moved_x) == 0)
    by_size = Magnitude(sparsity=0.5)
    masks = [by_size.tensor(site_of(each), each, None).zeros for each in (weight, moved_weight)]
    assert not torch.equal(*masks)


def test_for_orthogonal_inputs_no_mask_of_that_size_changes_the_output_less() -> None:
    weight = random(1, 6)
    x = torch.diag(torch.tensor([3.0, 0.2, 1.0, 5.0, 0.7, 2.0], dtype=torch.float64))
    errors = []
    for gone in combinations(range(6), 3):
        other = weight.clone()
        other[:, list(gone)] = 0
        errors.append(float((x @ (weight - other).T).norm()))
    assert float((x @ (weight - prune(weight, x)).T).norm()) == min(errors)


def test_a_pattern_takes_the_smallest_scores_of_each_group() -> None:
    weight, x = random(5, 8), random(40, 8, seed=1) * torch.arange(1, 9)
    pruned = prune(weight, x, sparsity=None, pattern="2:4")
    for row in range(5):
        for start in (0, 4):
            group = range(start, start + 4)
            scores = {j: abs(weight[row, j].item()) * x[:, j].norm().item() for j in group}
            gone = sorted(group, key=scores.__getitem__)[:2]
            assert [float(pruned[row, j]) for j in group] == [
                0.0 if j in gone else float(weight[row, j]) for j in group
            ]


def test_masks_nest_in_each_row_also_with_ties() -> None:
    weight, x = torch.ones(3, 20), torch.ones(7, 20)
    x[:, :10] = 2
    before = torch.zeros(3, 20, dtype=torch.bool)
    for sparsity in (0.1, 0.4, 0.8):
        zeros = prune(weight, x, sparsity=sparsity) == 0
        assert zeros.sum(1).tolist() == [int(20 * sparsity)] * 3
        assert not (before & ~zeros).any()
        before = zeros


def test_contract() -> None:
    check_pass(Wanda(sparsity=0.5), "llama")
    check_pass(Wanda(pattern="2:4", inputs="original"), "vit")
