"""Compare scores with direct computation: autograd on a merged float64 model, singular values, loops."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import registry
from finetune.core.attach import merge, patched
from finetune.core.linalg import low_rank
from finetune.core.sparse.probe import scan_scores
from finetune.core.sparse.scores import ScoredSite, score_named
from finetune.core.sparse.select import TopK
from finetune.core.sparse.settings import ScoreName
from finetune.methods.sparse.sparse import Crossing
from finetune.testing import contract
from finetune.testing.sessions import Kind
from finetune.training.session import Session

TARGETS = ("o", "down")  # of GPT-2 both are stored transposed


def double(session: Session) -> Session:
    """Make the session float64, and move its entries away from 0."""
    session.start()
    session.model.double()
    bank = session.states["method"]["bank"].double()
    bank.values.data[: bank.active] = (
        torch.randn(bank.active, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 10
    )
    plain = session.compute.on_device
    session.compute.on_device = lambda inputs: {
        k: v.double() if v.is_floating_point() else v for k, v in plain(inputs).items()
    }  # type: ignore[method-assign]
    return session


def scanned(session: Session, method: Crossing) -> list[Tensor]:
    layers = list(patched(session.model).values())
    found: dict[int, Tensor] = {}
    scan_scores(
        method,
        session.run,
        session.states["method"]["bank"],
        layers,
        [None] * len(layers),
        lambda i, s: found.__setitem__(i, s),
    )
    assert sorted(found) == list(range(len(layers)))
    assert all(s.dtype == torch.float32 for s in found.values())
    return [found[i] for i in range(len(layers))]


def merged(session: Session) -> tuple[nn.Module, list[str]]:
    """Return the model with plain layers, and the names of the adapted ones."""
    names = list(patched(session.model))
    model, states = copy.deepcopy((session.model, session.states))
    merge(model, states)
    return model.eval(), names


def example_losses(model: nn.Module, session: Session, batch: Any) -> list[tuple[Tensor, int]]:
    """Return the summed loss of each example, and its number of predictions."""
    out = model(**session.compute.on_device(batch.inputs)).logits
    found = []
    for logits, label in zip(out, batch.labels, strict=True):
        if label.ndim == 0:
            found.append((nn.functional.cross_entropy(logits[None], label[None]), 1))
        else:
            found.append(
                (
                    nn.functional.cross_entropy(logits[:-1], label[1:], reduction="sum"),
                    int((label[1:] != -100).sum()),
                )
            )
    return found


@cache
def case(kind: Kind, micro: int | None, batches: int) -> tuple[Session, dict[str, list[Tensor]]]:
    """Return a session, and the gradients of its merged weights by direct computation."""
    train = replace(contract.TRAIN, micro_batch_size=micro)
    session = double(contract.begin(Crossing(sparsity=0.7, targets=TARGETS), kind, train))
    model, names = merged(session)
    weights = [model.get_submodule(n).weight.requires_grad_() for n in names]
    out = [torch.zeros_like(w) for w in weights]
    found = {
        "sum": out,
        "squared examples": [torch.zeros_like(w) for w in weights],
        "squared batches": [torch.zeros_like(w) for w in weights],
    }
    for step in session.batches.steps(0, batches):
        losses = [one for batch in step if batch for one in example_losses(model, session, batch)]
        counted = sum(n for _, n in losses)
        each = [torch.autograd.grad(loss, weights, retain_graph=True) for loss, _ in losses]
        for j in range(len(weights)):
            whole = sum(g[j] for g in each) / counted
            found["sum"][j] += whole
            found["squared batches"][j] += whole**2
            found["squared examples"][j] += sum(g[j] ** 2 for g in each)
    transposed = kind == "gpt2"
    found["w"] = [w.detach() for w in weights]
    return session, {k: [t.T if transposed else t for t in v] for k, v in found.items()}


OF_GRADIENTS = [name for name, entry in registry.catalog("score").items() if "needs" in entry.facts]
CASES: list[tuple[Kind, int | None, int]] = [
    ("vit", None, 1),
    ("vit", 3, 2),
    ("gpt2", 3, 1),
    ("gpt2", None, 2),
]


@pytest.mark.parametrize(("kind", "micro", "batches"), CASES)
@pytest.mark.parametrize("score", OF_GRADIENTS)
def test_scores_of_gradients(score: ScoreName, kind: Kind, micro: int | None, batches: int) -> None:
    session, seen = case(kind, micro, batches)
    formulas = {
        "gradient": lambda g, w, f, s: g.abs(),
        "gradient_weight": lambda g, w, f, s: g * w,
        "snip": lambda g, w, f, s: (g * w).abs(),
        "fisher": lambda g, w, f, s: f,
        "sensitivity": lambda g, w, f, s: s,
        "d3": lambda g, w, f, s: g.abs() / (w.abs() + 0.02) ** 0.5,
    }
    columns = zip(seen["sum"], seen["w"], seen["squared examples"], seen["squared batches"], strict=True)
    more = {"power": 0.5, "eps": 0.02} if score == "d3" else {}
    method: Any = session.method
    found = scanned(session, replace(method, score=score, batches=batches, **more))
    for ours, column in zip(found, columns, strict=True):
        wanted = formulas[score](*column)
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(ours, wanted.float(), rtol=1e-5, atol=1e-7 * float(wanted.abs().max()))


def test_fisher_squares_each_example_and_not_their_sum() -> None:
    _, seen = case("vit", None, 1)
    assert not torch.allclose(seen["squared examples"][0], seen["squared batches"][0] * 64, rtol=0.1)


# Scores of the weights


def make_site(w: Tensor, change: Tensor | None = None, trained: Tensor | None = None) -> ScoredSite:
    """A layer of weight ``w``, and a change of it as a delta would make it."""
    from finetune.core.layer import Patched
    from finetune.core.part import Delta

    class Fixed(Delta):
        def forward(self, weight: Tensor) -> Tensor:
            assert change is not None
            return change

    layer = nn.Linear(w.shape[1], w.shape[0], bias=False).requires_grad_(False)
    layer.weight.data = w
    made = Patched(layer)
    if change is not None:
        made.deltas.append(Fixed())
    return ScoredSite(made, torch.Generator().manual_seed(0), None, trained)


def test_magnitude_and_change_see_the_weight_as_it_is_now() -> None:
    w, change, trained = torch.randn(3, 6, 5).unbind()
    method = Crossing()
    assert torch.equal(score_named("magnitude")(make_site(w, change), method), (w + change).abs())
    assert torch.equal(score_named("change")(make_site(w, change), method), (w + change - w).abs())
    assert torch.equal(score_named("magnitude")(make_site(w, None, trained), method), trained.abs())
    assert torch.equal(score_named("change")(make_site(w, None, trained), method), (trained - w).abs())


@pytest.mark.parametrize("score", ["magnitude", "change", "lowrank_magnitude", "principal", "off_principal"])
def test_a_score_leaves_the_weights_alone_and_is_float32(score: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w, trained = torch.randn(6, 5).to(dtype), torch.randn(6, 5)
        before = w.clone(), trained.clone()
        for given in (None, trained):
            assert (
                score_named(score)(
                    make_site(w, None, given), Crossing(score="lowrank_magnitude", rank=2)
                ).dtype
                == torch.float32
            )
        assert torch.equal(w, before[0])
        assert torch.equal(trained, before[1])


def test_random_is_drawn_from_the_runs_generator() -> None:
    first, again = make_site(torch.randn(300, 200)), make_site(torch.randn(300, 200))
    a, b, c = (score_named("random")(x, Crossing()) for x in (first, again, first))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert abs(float(a.mean()) - 0.5) < 0.01


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_low_rank_is_the_truncated_singular_value_decomposition(shape: tuple[int, int], rank: int) -> None:
    w = torch.randn(shape)
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    found = low_rank(w, rank)
    assert int(torch.linalg.matrix_rank(found.double(), rtol=1e-5)) == rank
    torch.testing.assert_close(found, best.float(), rtol=1e-4, atol=1e-5)
    for name in ("lowrank_magnitude", "principal"):
        score = score_named(name)(make_site(w), Crossing(score="principal", rank=rank))
        torch.testing.assert_close(score, best.abs().float(), rtol=1e-4, atol=1e-5)


def test_low_rank_of_what_has_no_higher_rank_is_the_matrix() -> None:
    thin = torch.randn(9, 2) @ torch.randn(2, 7)
    torch.testing.assert_close(low_rank(thin, 4), thin, rtol=1e-4, atol=1e-5)
    w = torch.randn(4, 9)
    found = low_rank(w, 4)
    assert torch.equal(found, w)
    assert found.data_ptr() != w.data_ptr()


def test_off_principal_takes_the_union_of_the_small_and_the_small_after_rank_reduction() -> None:
    """For every a, the best entries are the union of the a smallest |w| and the a smallest |W_R|."""
    w = torch.randn(12, 9)
    by_weight, by_rank = (x.abs().view(-1).argsort() for x in (w, low_rank(w, 3)))
    for a in range(1, 108, 7):
        union = set(by_weight[:a].tolist()) | set(by_rank[:a].tolist())
        top = TopK(len(union), {0: 1})
        top.add(0, score_named("off_principal")(make_site(w), Crossing(score="off_principal", rank=3)))
        assert set(top.take()[0].tolist()) == union
