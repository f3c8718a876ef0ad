"""Passes that score: what they agree on, what they hold at once, and that they leave no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune.core.part import patched
from finetune.core.sparse import probe
from finetune.core.sparse.engine import ScoreName
from finetune.core.sparse.probe import scan
from finetune.errors import ConfigError
from finetune.methods.sparse.sparse import Crossing
from finetune.testing import contract
from finetune.training.session import Session

SCORES: tuple[ScoreName, ...] = ("gradient", "fisher", "sensitivity")


def session(micro: int | None = None, model: Any = None, targets: tuple[str, ...] = ("o", "mlp")) -> Session:
    started = contract.begin(
        Crossing(sparsity=0.7, targets=targets),
        train=replace(contract.TRAIN, micro_batch_size=micro),
        model=model,
    )
    started.start()
    return started


def scores(s: Session, score: ScoreName, batches: int = 1) -> list[Tensor]:
    layers = list(patched(s.model).values())
    found: dict[int, Tensor] = {}

    def take(i: int, one: Tensor) -> None:
        assert i not in found, "a site was offered twice"
        found[i] = one

    scan(
        replace(s.method, score=score, batches=batches),
        s.run,
        s.states["method"]["bank"],
        layers,
        [None] * len(layers),
        take,
    )  # type: ignore[type-var]
    return [found[i] for i in range(len(layers))]


@pytest.mark.parametrize("score", SCORES)
def test_one_pass_and_passes_in_turns_agree(score: ScoreName, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in one micro-batch is scored as backward goes by; in two, the sites take turns."""
    asked = []
    backward = Session._probe
    monkeypatch.setattr(Session, "_probe", lambda self, *args: [asked.append(1), backward(self, *args)][1])
    whole = scores(session(), score)
    assert len(asked) == 1
    parts = scores(session(5), score)
    assert len(asked) == 1 + 2 * 6  # no two of o, up and down together are as small as up
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.max()))
        assert float(a.max()) > 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(deadline=None)
def test_turns_are_consecutive_and_no_larger_than_the_largest(sizes: list[int]) -> None:
    groups = list(probe._turns(sizes))
    assert [i for group in groups for i in group] == list(range(len(sizes)))
    assert all(group and sum(sizes[i] for i in group) <= max(sizes) for group in groups)


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_sums_never_hold_more_than_the_largest_site(
    score: ScoreName, micro: int | None, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice that where sums are squared batch by batch. One pass that tells all holds nothing."""
    held = []

    class Counting(probe._Sums):
        def count(self) -> None:
            held.append(sum(t.numel() for t in [*self.batch.values(), *self.total.values()]))

        def __call__(self, i: int, grad: Any) -> bool:
            found = super().__call__(i, grad)
            self.count()
            return found

        def end_of_batch(self) -> None:
            self.count()
            super().end_of_batch()
            self.count()

    monkeypatch.setattr(probe, "_Sums", Counting)
    s = session(micro)
    largest = max(s.states["method"]["bank"].sizes)
    scores(s, score, batches)
    squares = score == "sensitivity" and batches > 1
    assert max(held) == (0 if micro is None and batches == 1 else largest * (1 + squares))


def test_a_layer_that_the_loss_does_not_reach_has_gradient_zero() -> None:
    for micro in (None, 3):
        model = contract.tiny()
        model.vit.extra = nn.Linear(4, 6)
        *_, unreached = scores(session(micro, model, ("o", "extra")), "gradient")
        assert torch.equal(unreached, torch.zeros(6, 4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.inner(x))
        return y


@pytest.mark.parametrize(("micro", "score"), [(None, "gradient"), (3, "fisher")])
def test_a_layer_that_runs_twice_is_refused_where_its_parts_cannot_be_joined(
    micro: int | None, score: ScoreName
) -> None:
    model = contract.tiny()
    model.vit.layers[0].mlp.fc1 = nn.Sequential(model.vit.layers[0].mlp.fc1, Twice())
    with pytest.raises(ConfigError, match=r"more than once a pass.*magnitude"):
        scores(session(micro, model, ("inner",)), score)


def test_looking_leaves_no_trace() -> None:
    s = session(3)
    s.tuned.train()
    bank = s.states["method"]["bank"]
    bank.frozen[1] = True
    rng, drawn = torch.get_rng_state(), s.run.generator.get_state()
    before = {k: v.clone() for k, v in s.tuned.state_dict().items()}
    found = scores(s, "gradient", 2)
    assert float(found[1].max()) > 0, "a site that rests is seen too"
    assert bank.frozen == [False, True, *[False] * (len(bank.sizes) - 2)]
    assert bank.watch is None
    assert s.tuned.training
    assert all(p.grad is None for p in s.tuned.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(s.run.generator.get_state(), drawn)
    assert all(torch.equal(v, before[k]) for k, v in s.tuned.state_dict().items())
    again = scores(s, "gradient", 2)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_watch_ends_when_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session()
    monkeypatch.setattr(s.run, "backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores(s, "gradient")
    assert s.states["method"]["bank"].watch is None
