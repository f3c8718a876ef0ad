"""Test SNELLA.

The oracles are autograd over a plain dense formula, SNELL, and the allocator's recursions written out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.core.attach import patched
from finetune.core.kernel import Kernel
from finetune.core.layer import changed_linear
from finetune.errors import ConfigError
from finetune.methods.reparam.snell import SNELL
from finetune.methods.reparam.snella import SNELLA, Competing
from finetune.storage.delta import load_delta, save_delta, tensors_to_store
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test
from finetune.training.session import Session

CASES = [
    Case(
        "snella",
        lambda: SNELLA(rank=8, every=2),
        ("vit", "gpt2"),
        data_dependent=True,
        settings=("method.every=2",),
    ),
    Case(
        "snella plain",
        lambda: SNELLA(rank=8, softmax=False, sparsity=0.5, dropout=0.1, drop_path=0.1),
        data_dependent=True,
    ),
]

PUBLISHED = Published(
    "arXiv 2510.24037: the released code and its scripts",
    {
        "rank": 32,
        "sparsity": 0.9,
        "sparsifier": "released",
        "scale": 0.1,
        "softmax": True,
        "initial": 0.0,
        "start": 0.0,
        "end": 1.0,
        "every": 1,
        "betas": (0.85, 0.85),
        "dropout": 0.1,
        "drop_path": 0.1,
        "class_token": True,
        "class_token_decay": False,
    },
    {
        "end": (0.8, "the last steps train with the final division"),
        "every": (10, "the code divides once per epoch, this once in so many steps"),
        "dropout": (0.0, "the same training for all methods; dropout is a setting"),
        "drop_path": (0.0, "the same training for all methods; dropout is a setting"),
    },
)

test_contract = contract_test(CASES)

SIZES = [32 * 32] * 4 + [48 * 32] * 2  # of the tiny model's layers, a block


def make(shape: tuple[int, int] = (60, 40), grow: float = 10.0, **options: Any) -> Competing:
    """Return a float64 delta with factors as large as training makes them."""
    torch.manual_seed(0)
    delta = Competing(shape, SNELLA(**{"rank": 8, "initial": 0.7, **options})).double()
    for p in (delta.rows, delta.cols):
        p.data.mul_(grow)
    return delta


def plain_kernel(rows: Tensor, cols: Tensor, mix: Tensor) -> Tensor:
    """Compute K in the published layout, [in, out], and transpose it at the end."""
    distance = torch.cdist(cols, rows, compute_mode="donot_use_mm_for_euclid_dist")
    first = 0.1 * distance[0] - 0.1 * distance[1]
    return (first + mix[0] * torch.softmax(first / mix[1], dim=-1) + mix[2]).mT


def plain_change(kernel: Tensor, sparsity: float) -> Tensor:
    size = kernel.detach().abs()
    return kernel * torch.where(size > torch.quantile(size, sparsity), size, 0)


def deltas(session: Session) -> list[Competing]:
    return [m for m in session.states.modules() if isinstance(m, Competing)]


@pytest.mark.parametrize("initial", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("mix", [[1.0, 1.0, 0.0], [-0.7, 0.5, 0.02]])
def test_change_and_gradients_equal_autograd(initial: float, mix: list[float]) -> None:
    delta = make((70, 600), initial=initial)  # more columns than one block
    delta.mix.data.copy_(torch.tensor(mix))
    weight, bias = torch.randn(70, 600, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    x = torch.randn(3, 5, 600, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(3, 5, 70, dtype=torch.float64)
    delta.gate = 0.5
    y = changed_linear(x, weight, bias, [delta])
    found = torch.autograd.grad((y * pull).sum(), [x, *delta.inputs()])
    leaves = [p.detach().clone().requires_grad_() for p in (delta.rows, delta.cols, delta.mix)]
    change = plain_change(plain_kernel(*leaves), initial)
    expected = nn.functional.linear(x, weight + 0.5 * change, bias)
    torch.testing.assert_close(y, expected)
    assert torch.equal(delta(weight) != 0, change != 0)
    for mine, true in zip(found, torch.autograd.grad((expected * pull).sum(), [x, *leaves]), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sparsifier", ["released", "paper"])
def test_without_softmax_it_is_snell_to_the_bit(sparsifier: Any) -> None:
    torch.manual_seed(0)
    snell = Kernel((600, 70), SNELL(rank=8, sparsity=0.7, sparsifier=sparsifier))
    torch.manual_seed(0)
    mine = Competing((600, 70), SNELLA(rank=8, initial=0.7, softmax=False, sparsifier=sparsifier))
    weight, x = torch.randn(600, 70), torch.randn(4, 70)
    results = []
    for delta in (snell, mine):
        y = changed_linear(x, weight, None, [delta])
        results.append([y, delta(weight), *torch.autograd.grad(y.square().sum(), delta.inputs())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_alpha_and_beta_zero_reproduce_snell() -> None:
    delta = make()
    delta.mix.data[::2] = 0
    torch.manual_seed(0)
    snell = Kernel((60, 40), SNELL(rank=8, sparsity=0.7)).double()
    for p in snell.parameters():
        p.data.mul_(10)
    torch.testing.assert_close(delta(torch.zeros(60, 40)), snell(torch.zeros(60, 40)), rtol=1e-9, atol=0)


def test_sums_of_the_softmax_term_are_alpha() -> None:
    delta, without = make(), make(softmax=False)
    delta.mix.data.copy_(torch.tensor([0.8, 0.5, 0.0]))
    torch.testing.assert_close(
        (delta.kernel() - without.kernel()).sum(0), torch.full((40,), 0.8, dtype=torch.float64)
    )


def test_at_the_start_the_kernel_is_lifted_by_one_over_the_outputs() -> None:
    """With 768 outputs the offset of 1.3e-3 exceeds the spread of K_0 (about 5e-4), so most entries are
    positive."""
    torch.manual_seed(0)
    delta = Competing((768, 768), SNELLA(rank=32))
    kernel, first = delta.kernel(), Kernel.kernel(make((768, 768), 1.0, rank=32, softmax=False))
    assert abs((kernel.double() - first).mean().item() - 1 / 768) < 1e-6
    assert 4e-4 < first.std().item() < 8e-4
    assert (kernel > 0).float().mean() > 0.9


def test_budget_follows_the_cubic_curve() -> None:
    """Compare with ten updates from 0 to 0.9 worked out by hand."""
    method = SNELLA(sparsity=0.9, start=0.2, end=0.7, every=5)
    zeroed = [1 - method.budget(t, 100, 10**6) / 10**6 for t in range(20, 71, 5)]
    expected = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    assert zeroed == pytest.approx(expected, abs=1.1e-6)
    assert method.budget(45, 100, 10**6) == round((1 - 0.9 * 7 / 8) * 10**6)


def test_budget_never_grows_and_meets_both_ends() -> None:
    for method in (
        SNELLA(initial=0.2, sparsity=0.85),
        SNELLA(sparsity=0.99, start=0.3, end=1.0),
        SNELLA(initial=0.5, sparsity=0.5),
    ):
        budgets = [method.budget(t, 50, 12347) for t in range(50)]
        assert budgets == sorted(budgets, reverse=True)
        assert budgets[0] == round((1 - method.initial) * 12347)
        assert budgets[-1] == round((1 - method.sparsity) * 12347)


def run(method: SNELLA, each: Any) -> Session:
    """Make a short run on the tiny model, calling ``each(session, step)`` after every step."""
    session = contract.begin(method)
    for step in session.steps():
        each(session, step)
    return session


def test_divisions_add_up_to_the_budget_and_happen_when_due() -> None:
    """The parts add up to V, none above its layer's size; V is divided at due steps after ``start``, and at
    ``end``."""
    method = SNELLA(rank=4, sparsity=0.8, start=0.2, end=0.7, every=2)
    seen: dict[int, list[int]] = {}

    def each(session: Session, step: Any) -> None:
        volumes = [int(d.volume) for d in deltas(session)]
        if "sparsity" in step.metrics:
            total = sum(d.size for d in deltas(session))
            assert sum(volumes) == method.budget(step.number - 1, contract.STEPS, total)
            assert step.metrics["sparsity"] == pytest.approx(1 - sum(volumes) / total)
            assert all(0 <= v <= d.size for v, d in zip(volumes, deltas(session), strict=True))
            seen[step.number - 1] = volumes
        else:
            assert volumes == (list(seen.values())[-1] if seen else SIZES * 2)

    run(method, each)
    assert list(seen) == [3, 4, 5]  # 6 steps: from 1 to 4, every second, the end, and every second again
    assert len({tuple(v) for v in seen.values()}) == 3


def test_non_zeros_right_after_a_division() -> None:
    """Each layer has n - 1 - floor(s (n - 1)) non-zero entries, with s = 1 - a / n."""
    session = run(SNELLA(rank=4, sparsity=0.8, end=1.0, every=1), lambda *_: None)
    for delta in deltas(session):
        n, a = delta.size, int(delta.volume)
        found = int((delta(torch.zeros(delta.shape)) != 0).sum())
        assert found == n - 1 - ((n - a) * (n - 1)) // n
    assert sum(int(d.volume) for d in deltas(session)) == round(0.2 * sum(SIZES) * 2)


def test_scores_are_the_written_out_recursions(monkeypatch: pytest.MonkeyPatch) -> None:
    """I and U come from the updated factors and the one gradient of the step, over micro-batches.

    The division goes by mean(I U), summed over both factors.
    """
    method = SNELLA(rank=4, every=1, end=1.0, betas=(0.8, 0.6))
    steps: list[list[Tensor]] = []
    real = SNELLA.after_step

    def spy(self: SNELLA, run: Any, state: Any) -> None:
        real(self, run, state)
        steps.append(
            [(p * p.grad).detach().abs().double() for d in deltas(session) for p in (d.rows, d.cols)]
        )

    monkeypatch.setattr(SNELLA, "after_step", spy)
    session = contract.begin(method, train=replace(contract.TRAIN, micro_batch_size=3))
    assert [s.number for s in session.steps()] == [1, 2, 3, 4, 5, 6]
    assert len(steps) == contract.STEPS
    importance, uncertainty = ([torch.zeros_like(t) for t in steps[0]] for _ in range(2))
    for seen in steps:
        importance = [0.8 * i + 0.2 * s for i, s in zip(importance, seen, strict=True)]
        uncertainty = [
            0.6 * u + 0.4 * (s - i).abs() for u, s, i in zip(uncertainty, seen, importance, strict=True)
        ]
    means = [(i * u).mean().item() for i, u in zip(importance, uncertainty, strict=True)]
    for delta, a, b in zip(deltas(session), means[::2], means[1::2], strict=True):
        assert delta.score().item() == pytest.approx(a + b, rel=1e-4)
        assert a > 0
        assert b > 0


class Fake:
    """A run with what ``before_step`` uses."""

    def __init__(self, step: int, total: int) -> None:
        self.step, self.total, self.logged = step, total, dict[str, float]()

    def average_or_broadcast(self, t: Tensor) -> Tensor:
        return t

    def log(self, **metrics: float) -> None:
        self.logged |= metrics


def divided(
    method: SNELLA, scores: list[float], shapes: list[tuple[int, int]], step: int = 9
) -> list[Competing]:
    """Return the parts of one division among layers with these scores."""
    state = nn.ModuleList([Competing(shape, method) for shape in shapes])
    for delta, score in zip(state, scores, strict=True):
        delta.get_buffer("rows_importance").fill_(score)
        delta.get_buffer("rows_uncertainty").fill_(1.0)
    method.before_step(Fake(step, 10), state)  # type: ignore[arg-type]
    return list(state)  # type: ignore[arg-type]


def test_equal_scores_and_sizes_give_equal_shares_and_a_full_budget_zeroes_nothing() -> None:
    method = SNELLA(rank=2, sparsity=0.75, every=1)
    assert [int(d.volume) for d in divided(method, [3.0] * 3, [(8, 6)] * 3)] == [12] * 3
    full = divided(SNELLA(rank=2, sparsity=0.0, every=1), [1.0, 7.0, 0.0], [(8, 6), (8, 6), (5, 4)])
    assert [int(d.volume) for d in full] == [48, 48, 20]


def test_a_layer_gets_its_score_s_part_but_no_more_than_its_size() -> None:
    """Of 100, with room for 48 per layer, the parts are 48, 42 and 10: the excess goes to the others."""
    method = SNELLA(rank=2, sparsity=1 - 100 / 144, every=1)
    assert [int(d.volume) for d in divided(method, [5.0, 4.0, 1.0], [(8, 6)] * 3)] == [48, 42, 10]


def test_scores_that_are_all_zero_divide_by_size() -> None:
    method = SNELLA(rank=2, sparsity=0.75, every=1)
    assert [int(d.volume) for d in divided(method, [0.0, 0.0], [(8, 6), (20, 6)])] == [12, 30]


def test_an_empty_layer_changes_nothing_and_its_score_only_decays() -> None:
    """At s = 1 there is no change and no gradient, hence no new importance."""
    delta = make(betas=(0.8, 0.6))
    delta.volume.fill_(0)
    assert not delta(torch.zeros(60, 40)).any()
    x = torch.randn(5, 40, dtype=torch.float64)
    weight = torch.randn(60, 40, dtype=torch.float64)
    y = changed_linear(x, weight, None, [delta])
    torch.testing.assert_close(y, x @ weight.T)
    y.square().sum().backward()
    assert not any(p.grad is None or p.grad.any() for p in delta.parameters())
    for name in ("rows_importance", "cols_importance"):
        delta.get_buffer(name).fill_(1.0)
    delta.observe_gradient((0.8, 0.6))
    torch.testing.assert_close(delta.rows_importance, torch.full_like(delta.rows, 0.8))
    before = delta.score()
    delta.observe_gradient((0.8, 0.6))
    delta.observe_gradient((0.8, 0.6))
    assert delta.score() < before


def test_gradients_that_are_no_numbers_count_as_zero() -> None:
    delta = make(betas=(0.8, 0.6))
    delta.rows.grad, delta.cols.grad = (
        torch.full_like(delta.rows, float("nan")),
        torch.full_like(delta.cols, float("inf")),
    )
    delta.observe_gradient((0.8, 0.6))
    assert delta.score() == 0


def test_output_at_the_start_is_close_to_the_base_but_not_equal() -> None:
    session = contract.begin(SNELLA(rank=8))
    session.start()
    base, now = contract.logits(contract.tiny()), contract.logits(session.tuned)
    assert not torch.equal(base, now)
    torch.testing.assert_close(now, base, atol=0.3, rtol=0)


def test_the_division_is_stored_and_its_averages_only_in_checkpoints(tmp_path: Path) -> None:
    session = run(SNELLA(rank=4, every=2), lambda *_: None)
    kept = tensors_to_store(session.states)
    assert not [k for k in kept if "importance" in k or "uncertainty" in k]
    assert any("uncertainty" in k for k in session.state_dict()["states"])
    save_delta(tmp_path / "delta", session.states, {})
    new = contract.begin(SNELLA(rank=4, every=2), seed=5)
    load_delta(tmp_path / "delta", new.states)
    assert [int(d.volume) for d in deltas(new)] == [int(d.volume) for d in deltas(session)]
    assert {int(d.volume) for d in deltas(new)} != set(SIZES)
    assert torch.equal(contract.logits(new.tuned), contract.logits(session.tuned))
    with pytest.raises(ConfigError, match="do not fit"):
        make((60, 40)).unpack(make((40, 60)).pack())


def test_no_matrix_is_kept_for_backward_nor_in_optimizer_or_checkpoint() -> None:
    delta, x, sizes = make((90, 80)).float(), torch.randn(4, 80, requires_grad=True), list[int]()

    def note(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        changed_linear(x, torch.randn(90, 80), None, [delta])
    assert sizes == [x.numel()]
    session = run(SNELLA(rank=4), lambda *_: None)
    shapes = {layer.original.shape for layer in patched(session.model).values()}
    saved = session.state_dict()
    held = [t for entry in saved["optimizer"]["state"].values() for t in entry.values()] + list(
        saved["states"].values()
    )
    assert not [t.shape for t in held if t.shape in shapes]


def test_scalars_do_not_decay() -> None:
    groups = contract.begin(SNELLA(rank=4)).optimizer.param_groups
    assert {p.ndim for p in groups[0]["params"]} == {2, 3}
    assert sum(p.shape == (3,) for p in groups[1]["params"]) >= 12


def test_contradictory_settings_of_snella_are_refused() -> None:
    with pytest.raises(ValueError, match=r"initial=0\.95 is above method\.sparsity=0\.9"):
        SNELLA(initial=0.95)
    with pytest.raises(ValueError, match=r"start=0\.8 is not before"):
        SNELLA(start=0.8, end=0.5)
    assert not SNELLA().faults(2)
    assert "train.steps=1 leaves no step between method.start=0 and method.end=0.8" in SNELLA().faults(1)[0]
