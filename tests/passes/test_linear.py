"""Linear folding: the formula, its settings, and the checks of every pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune.core.site import Site
from finetune.passes.linear import Linear
from finetune.testing.passes import check_pass

SITE = Site("layer", nn.Linear(3, 2), 0, "q", (2, 3))


def draw(seed: int) -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weights", [(0.5, 0.25), (1.0, -1.0), (2.0, 0.0)])
def test_the_formula(weights: tuple[float, float]) -> None:
    base, first, second = draw(0), draw(1), draw(2)
    found = Linear(weights=weights).combine(SITE, base, [first - base, second - base])
    for place, value in enumerate(found.flatten().tolist()):
        w, a, b = (float(t.flatten()[place]) for t in (base, first, second))
        assert value == pytest.approx(w + weights[0] * (a - w) + weights[1] * (b - w), abs=1e-12)


def test_without_weights_the_result_is_the_mean_of_the_models() -> None:
    base, first, second = draw(0), draw(1), draw(2)
    found = Linear().combine(SITE, base, [first - base, None, second - base])
    torch.testing.assert_close(found, (first + base + second) / 3)


def test_a_weight_of_zero_gives_the_base_to_the_bit() -> None:
    assert torch.equal(Linear(weights=(0.0,)).combine(SITE, draw(0), [draw(1)]), draw(0))


def test_as_many_weights_as_models() -> None:
    assert Linear().count_faults(3) == Linear(weights=(1.0, 2.0)).count_faults(2) == []
    (fault,) = Linear(weights=(1.0, 2.0)).count_faults(3)
    assert fault.startswith("weights=1,2: the number of weights is 2, and that of runs 3.")


def test_contract() -> None:
    check_pass(Linear(weights=(0.5, -1.0)), "gpt2")
