"""Test the backward passes that compute scores: their sums, their memory, and that they leave no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune.core.attach import patched
from finetune.core.sparse import probe
from finetune.core.sparse.probe import scan_scores
from finetune.core.sparse.settings import ScoreName
from finetune.core.statistics import divide_by_size
from finetune.errors import ConfigError
from finetune.methods.sparse.sparse import Crossing
from finetune.testing import contract
from finetune.training.compute import Compute
from finetune.training.session import Session

SCORES: tuple[ScoreName, ...] = ("gradient", "fisher", "sensitivity")


def session(micro: int | None = None, model: Any = None, targets: tuple[str, ...] = ("o", "mlp")) -> Session:
    """Start a session whose steps have micro-batches of ``micro`` examples; None: one micro-batch a step."""
    method = Crossing(sparsity=0.7, targets=targets)
    started = contract.begin(method, train=replace(contract.TRAIN, micro_batch_size=micro), model=model)
    started.start()
    return started


def scores(s: Session, score: ScoreName, batches: int = 1) -> list[Tensor]:
    """Return the scores of every site."""
    layers = list(patched(s.model).values())
    found: dict[int, Tensor] = {}

    def visit(i: int, values: Tensor) -> None:
        assert i not in found, "a site was visited twice"
        found[i] = values

    method: Any = replace(s.method, score=score, batches=batches)  # type: ignore[type-var]
    scan_scores(method, s.run, s.states["method"]["bank"], layers, [None] * len(layers), visit)
    return [found[i] for i in range(len(layers))]


@pytest.mark.parametrize("score", SCORES)
def test_one_pass_and_passes_in_turns_agree(score: ScoreName, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch is scored in its only pass; with two, the sites take turns."""
    passes = []
    backward = Compute.probe

    def count_and_run(self: Compute, *args: Any) -> None:
        passes.append(1)
        backward(self, *args)

    monkeypatch.setattr(Compute, "probe", count_and_run)
    whole = scores(session(), score)
    assert len(passes) == 1
    parts = scores(session(5), score)
    assert len(passes) == 1 + 2 * 6  # no two of o, up and down together are as small as up
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.max()))
        assert float(a.max()) > 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(deadline=None)
def test_groups_are_consecutive_and_no_larger_than_the_largest_site(sizes: list[int]) -> None:
    groups = list(divide_by_size(sizes, max(sizes)))
    assert [i for group in groups for i in group] == list(range(len(sizes)))
    assert all(group and sum(sizes[i] for i in group) <= max(sizes) for group in groups)


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_sums_never_hold_more_than_the_largest_site(
    score: ScoreName, micro: int | None, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums take twice that where gradients of steps are squared, and nothing if one pass is enough."""
    stored = []

    class Counting(probe._GradientSums):
        def count(self) -> None:
            stored.append(sum(t.numel() for t in [*self.sums.values(), *self.squares.values()]))

        def add(self, i: int, grad: Any) -> bool:
            seen = super().add(i, grad)
            self.count()
            return seen

        def end_step(self) -> None:
            self.count()
            super().end_step()
            self.count()

    monkeypatch.setattr(probe, "_GradientSums", Counting)
    s = session(micro)
    largest = max(s.states["method"]["bank"].sizes)
    scores(s, score, batches)
    squares = score == "sensitivity" and batches > 1
    assert max(stored) == (0 if micro is None and batches == 1 else largest * (1 + squares))


def test_a_layer_that_the_loss_does_not_reach_has_gradient_zero() -> None:
    for micro in (None, 3):
        model = contract.tiny()
        model.vit.extra = nn.Linear(4, 6)
        *_, unreached = scores(session(micro, model, ("o", "extra")), "gradient")
        assert torch.equal(unreached, torch.zeros(6, 4))


class Twice(nn.Module):
    """A layer that runs twice in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.inner(x))
        return y


@pytest.mark.parametrize(("micro", "score"), [(None, "gradient"), (3, "fisher")])
def test_a_layer_that_runs_twice_is_refused_where_its_gradients_cannot_be_summed(
    micro: int | None, score: ScoreName
) -> None:
    model = contract.tiny()
    model.vit.layers[0].mlp.fc1 = nn.Sequential(model.vit.layers[0].mlp.fc1, Twice())
    with pytest.raises(ConfigError, match=r"more than once a forward pass.*score=magnitude"):
        scores(session(micro, model, ("inner",)), score)


def test_scoring_leaves_no_trace() -> None:
    s = session(3)
    s.tuned.train()
    bank = s.states["method"]["bank"]
    bank.frozen[1] = True
    rng, drawn = torch.get_rng_state(), s.run.generator.get_state()
    before = {k: v.clone() for k, v in s.tuned.state_dict().items()}
    found = scores(s, "gradient", 2)
    assert float(found[1].max()) > 0, "a frozen site is scored too"
    assert bank.frozen == [False, True, *[False] * (len(bank.sizes) - 2)]
    assert bank.watch is None
    assert s.tuned.training
    assert all(p.grad is None for p in s.tuned.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(s.run.generator.get_state(), drawn)
    assert all(torch.equal(v, before[k]) for k, v in s.tuned.state_dict().items())
    second = scores(s, "gradient", 2)
    assert all(torch.equal(a, b) for a, b in zip(found, second, strict=True))


def test_watching_ends_when_a_backward_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session()
    monkeypatch.setattr(s.run, "backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores(s, "gradient")
    assert s.states["method"]["bank"].watch is None
