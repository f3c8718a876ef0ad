"""Test SNELL.

The oracles are ``torch.cdist`` without its matrix product, a sort or ``torch.quantile``, and autograd.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from finetune.core.kernel import Kernel
from finetune.core.layer import changed_linear
from finetune.core.linalg import kth_smallest
from finetune.core.site import Site
from finetune.methods.reparam.snell import SNELL
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test

CASES = [
    Case("snell", lambda: SNELL(rank=8, sparsity=0.9), ("vit", "gpt2", "llama"), data_dependent=True),
    Case("snell dense", lambda: SNELL(rank=8, sparsity=0.0)),
    Case("snell paper", lambda: SNELL(rank=8, sparsity=0.5, sparsifier="paper"), data_dependent=True),
    Case(
        "snell dropout",
        lambda: SNELL(rank=8, sparsity=0.5, dropout=0.1, drop_path=0.1),
        ("vit", "gpt2"),
        data_dependent=True,
    ),
]

PUBLISHED = Published(
    "arXiv 2411.01800: rank of the VTAB scripts, sparsity of the ablation in table 5a, "
    "the rest from the code",
    {
        "rank": 32,
        "sparsity": 0.9,
        "sparsifier": "released",
        "scale": 0.1,
        "dropout": 0.1,
        "drop_path": 0.1,
        "class_token": True,
        "class_token_decay": False,
    },
    {
        "dropout": (0.0, "the same training for all methods; dropout is a setting"),
        "drop_path": (0.0, "the same training for all methods; dropout is a setting"),
    },
)

test_contract = contract_test(CASES)


def make(shape: tuple[int, int] = (60, 40), grow: float = 10.0, **options: object) -> Kernel:
    """Return a float64 kernel delta with factors as large as training makes them."""
    torch.manual_seed(0)
    delta = Kernel(shape, SNELL(**{"rank": 8, "sparsity": 0.7, **options})).double()  # type: ignore[arg-type]
    for p in delta.parameters():
        p.data.mul_(grow)
    return delta


def plain_kernel(rows: Tensor, cols: Tensor) -> Tensor:
    distance = torch.cdist(rows, cols, compute_mode="donot_use_mm_for_euclid_dist")
    return 0.1 * (distance[0] - distance[1])


def plain_change(rows: Tensor, cols: Tensor, sparsity: float, sparsifier: str) -> Tensor:
    k = plain_kernel(rows, cols)
    size = k.detach().abs()
    cut = size.flatten().sort().values[int(sparsity * (size.numel() - 1))] if sparsity else size.new_zeros(())
    if sparsifier == "paper":
        return k * torch.relu(k.abs() - cut)
    return k * torch.where(size > torch.quantile(size, sparsity), size, 0) if sparsity else k


@pytest.mark.parametrize("sparsifier", ["released", "paper"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.7, 0.99])
def test_change_and_gradients_equal_autograd(sparsity: float, sparsifier: str) -> None:
    delta = make((300, 70), sparsity=sparsity, sparsifier=sparsifier)  # more rows than one block
    weight, bias = torch.randn(300, 70, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    x = torch.randn(3, 5, 70, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(3, 5, 300, dtype=torch.float64)
    y = changed_linear(x, weight, bias, [delta])
    found = torch.autograd.grad((y * pull).sum(), [x, delta.rows, delta.cols])
    rows, cols = (p.detach().clone().requires_grad_() for p in (delta.rows, delta.cols))
    expected = nn.functional.linear(x, weight + plain_change(rows, cols, sparsity, sparsifier), bias)
    torch.testing.assert_close(y, expected)
    for mine, true in zip(found, torch.autograd.grad((expected * pull).sum(), [x, rows, cols]), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.0001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(60, 40), (7, 13)])
def test_number_of_survivors(sparsity: float, shape: tuple[int, int]) -> None:
    n = shape[0] * shape[1]
    change = make(shape, sparsity=sparsity)(torch.zeros(shape))
    assert int((change != 0).sum()) == n - 1 - int(sparsity * (n - 1))


def test_survivors_are_signed_squares() -> None:
    delta = make()
    k, change = plain_kernel(delta.rows.detach(), delta.cols.detach()), delta(torch.zeros(60, 40))
    on = change != 0
    torch.testing.assert_close(change[on], (k.sign() * k.square())[on])
    assert k[on].abs().min() > k[~on].abs().max()


def test_sparsity_zero_switches_to_the_plain_kernel_in_the_released_reading_only() -> None:
    delta = make(sparsity=0.0)
    k = plain_kernel(delta.rows.detach(), delta.cols.detach())
    torch.testing.assert_close(delta(torch.zeros(60, 40)), k)
    torch.testing.assert_close(make(sparsity=0.0, sparsifier="paper")(torch.zeros(60, 40)), k * k.abs())


def test_initial_size_at_and_above_sparsity_zero() -> None:
    """At rank 32 and 768 x 768 the mean change is 4.9e-4 at sparsity 0 and 3.8e-7 above."""
    torch.manual_seed(0)
    weight = torch.zeros(768, 768)
    dense, sparse = (
        Kernel((768, 768), SNELL(rank=32, sparsity=s))(weight).detach().abs().mean().item()
        for s in (0.0, 0.001)
    )
    assert 4.4e-4 < dense < 5.4e-4
    assert 3.4e-7 < sparse < 4.2e-7


def test_swapping_heads_negates_the_change() -> None:
    delta, swapped = make(), make()
    for p in swapped.parameters():
        p.data = p.data.flip(0)
    torch.testing.assert_close(swapped(torch.zeros(60, 40)), -delta(torch.zeros(60, 40)))


def test_kernel_ignores_common_shifts_and_rotations() -> None:
    delta, moved = make(), make()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    shift = torch.randn(4, dtype=torch.float64)
    for p in moved.parameters():
        p.data = p.data @ rotation + shift
    torch.testing.assert_close(moved.kernel(), delta.kernel())


def test_scaling_the_factors() -> None:
    delta, scaled = make(), make(grow=30.0)
    weight = torch.zeros(60, 40)
    torch.testing.assert_close(scaled.kernel(), 3 * delta.kernel())
    torch.testing.assert_close(scaled(weight), 9 * delta(weight))
    assert torch.equal(scaled(weight) != 0, delta(weight) != 0)


def test_kernel_rank_is_far_above_the_factors() -> None:
    """At rank 8 and 768 x 768 the rank is about 340 at relative tolerance 1e-3; LoRA's is at most 8."""
    torch.manual_seed(0)
    values = torch.linalg.svdvals(Kernel((768, 768), SNELL(rank=8)).kernel())
    assert 300 < int((values > 1e-3 * values[0]).sum()) < 380


def test_every_factor_gets_a_gradient_above_a_frozen_stem() -> None:
    session = contract.begin(SNELL(rank=8, class_token=False))
    session.start()
    session._backward(next(session.batches.steps(0, 1)))
    deltas = [m for m in session.states.modules() if isinstance(m, Kernel)]
    assert len(deltas) == 12
    for delta in deltas:
        for p in delta.parameters():
            assert p.grad is not None
            assert p.grad.abs().sum() > 0


def test_no_matrix_is_kept_for_backward_nor_in_optimizer_or_checkpoint() -> None:
    delta = Kernel((90, 80), SNELL(rank=8))
    x = torch.randn(4, 80, requires_grad=True)
    sizes: list[int] = []

    def note(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        changed_linear(x, torch.randn(90, 80), None, [delta])
    assert sizes == [x.numel()]
    session = contract.finish(contract.begin(SNELL(rank=4)))
    shapes = {site.original.shape for site in session.model.modules() if hasattr(site, "original")}
    saved = session.state_dict()
    kept = [t for entry in saved["optimizer"]["state"].values() for t in entry.values()] + list(
        saved["states"].values()
    )
    assert kept
    assert not [t.shape for t in kept if t.shape in shapes]


def test_kernel_is_float32_on_a_bfloat16_base() -> None:
    torch.manual_seed(0)
    delta = Kernel((60, 40), SNELL(rank=8, sparsity=0.5))
    weight = torch.randn(60, 40).bfloat16()
    x = torch.randn(5, 40).bfloat16()
    assert delta(weight).dtype == torch.float32
    expected = nn.functional.linear(x, (weight.float() + delta(weight)).bfloat16())
    assert torch.equal(changed_linear(x, weight, None, [delta]), expected)


def test_drop_path_drops_the_branch_of_whole_examples() -> None:
    torch.manual_seed(0)
    delta = make(drop_path=0.5, sparsity=0.0).train()
    weight = torch.zeros(60, 40, dtype=torch.float64)
    y, whole = delta.linear(torch.ones(64, 3, 40, dtype=torch.float64), weight), delta(weight).sum(1)
    dropped = (y == 0).flatten(1).all(1)
    assert 15 < int(dropped.sum()) < 49
    torch.testing.assert_close(y[~dropped], (2 * whole).expand(int((~dropped).sum()), 3, 60))
    assert not delta.eval().additive


def test_class_token_is_trained_where_there_is_one() -> None:
    assert "class_token" in contract.begin(SNELL(rank=4)).states["method"]
    assert "class_token" not in contract.begin(SNELL(rank=4, class_token=False)).states["method"]
    assert "class_token" not in contract.begin(SNELL(rank=4), "llama").states["method"]


def test_threshold_beyond_what_torch_quantile_takes() -> None:
    x = torch.arange(
        2**24 + 5, 0, -1, dtype=torch.int32
    ).float()  # 2**24 + 1 is where float32 stops telling integers apart
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5)
    assert kth_smallest(x, 1000).item() == 1001.0


def test_kth_smallest_against_a_sort() -> None:
    x = torch.randn(37, 11)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for k in (0, 200, 406):
            assert kth_smallest(x.to(dtype), k) == x.to(dtype).flatten().sort().values[k]


def test_rank_counts_both_heads() -> None:
    delta = SNELL(rank=8).delta(Site("q", nn.Linear(40, 60), 0, "q", (60, 40)))
    assert sum(p.numel() for p in delta.parameters()) == 8 * (60 + 40)
    assert replace(SNELL(), sparsity=0.0).plain
