"""Linear mode connectivity, against closed formulas and the runs' own numbers.

The numbered invariants are those of the card of arXiv 2406.16300.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.analyses.lmc import (
    LinearModeConnectivity,
    check_buffers,
    estimate_error,
    make_grid,
    measure_heights,
    walk,
)
from finetune.artifacts.analyze import Analyzed, analyze
from finetune.errors import ConfigError
from finetune.testing.analyses import check_analysis, train_small
from finetune.training.evaluate import Evaluation

from ..support.tiny_model import TINY


class Theta(nn.Module):
    """A model that is one vector, in the dtype of ``like``."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros_like(like))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heights_of(loss: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, points: int = 25) -> list[float]:
    """Return the heights of a loss of one vector along the line from a to b."""
    model, grid = Theta(a), make_grid(points)
    ends = {"theta": a}, {"theta": b}
    return measure_heights(
        walk(model, ends, ["theta"], grid, lambda: float(loss(model.theta.double()))), grid
    )


def wave(theta: Tensor) -> Tensor:
    """A loss that is neither convex nor concave."""
    return torch.sin(2 * theta).sum() + 0.1 * theta.pow(2).sum() + torch.cos(theta[0] * theta[1])


def curvature(loss: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> float:
    """Return delta' H delta."""
    return float(along @ torch.autograd.functional.hessian(loss, at) @ along)


def test_equal_ends_have_no_barrier_and_swapped_ends_the_same() -> None:
    """Invariant 1, for float32 as in a run."""
    for seed in range(20):
        a, b = draw(6, seed=seed).float(), draw(6, seed=seed + 100).float()
        assert heights_of(wave, a, a) == [0.0] * 25
        forward, backward = heights_of(wave, a, b), heights_of(wave, b, a)
        assert max(forward) >= 0
        assert forward == backward[::-1]


def test_a_quadratic_loss_has_the_closed_form() -> None:
    """Invariant 2; a convex loss has no barrier, and minus that loss has its whole height."""
    root, a, b = draw(5, 5, seed=0), draw(5, seed=1), draw(5, seed=2)
    hessian, delta = root @ root.T, b - a
    bend = float(delta @ hessian @ delta)
    expected = [-0.5 * s * t * bend for s, t in make_grid(25)]
    assert heights_of(lambda x: x @ hessian @ x / 2, a, b) == pytest.approx(expected, abs=1e-11)
    assert max(heights_of(lambda x: x @ hessian @ x / 2, a, b)) == 0
    assert max(heights_of(lambda x: -(x @ hessian @ x) / 2, a, b)) == pytest.approx(bend / 8)


def test_heights_follow_from_curvature_on_the_line() -> None:
    """Invariants 3 and 4: the curvature that a height needs lies between those found on the segment."""
    for seed in range(5):
        a, b = draw(4, seed=seed), draw(4, seed=seed + 50)
        delta = b - a
        bends = [curvature(wave, a + t * delta, delta) for t in torch.linspace(0, 1, 401).double()]
        heights = heights_of(wave, a, b)
        for height, (s, t) in list(zip(heights, make_grid(25), strict=True))[1:-1]:
            assert min(bends) - 0.05 <= -2 * height / (s * t) <= max(bends) + 0.05
        assert max(heights) <= max(0.0, -min(bends)) / 8 + 1e-3


def test_layers_that_move_together_are_the_whole_line() -> None:
    """Invariant 8; a layer that stays has the weights of the first end."""
    net, grid = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), make_grid(7)
    ends: list[dict[str, Tensor]] = []
    for seed in (0, 1):
        ends.append({name: draw(*p.shape, seed=seed) for name, p in net.named_parameters()})
    x = draw(9, 3, seed=2)

    def measure() -> float:
        return float(net(x).square().sum())

    names = list(ends[0])
    whole = walk(net, (ends[0], ends[1]), names, grid, measure)
    assert whole == walk(net, (ends[0], ends[1]), [*names[2:], *names[:2]], grid, measure)
    part = walk(net, (ends[0], ends[1]), names[2:], grid, measure)
    expected = []
    for s, t in grid:
        hidden = torch.tanh(x @ ends[0]["0.weight"].T + ends[0]["0.bias"])
        weight, bias = (s * ends[0][name] + t * ends[1][name] for name in ("2.weight", "2.bias"))
        expected.append(float((hidden @ weight.T + bias).square().sum()))
    assert part == pytest.approx(expected)


def test_a_linear_function_of_the_weights_changes_nothing() -> None:
    """Invariant 5; the barrier above the mean of the ends changes."""
    a, b, slope = draw(4, seed=3), draw(4, seed=4), 3 * draw(4, seed=5)
    plain = heights_of(wave, a, b)
    assert heights_of(lambda x: wave(x) + slope @ x, a, b) == pytest.approx(plain, abs=1e-12)
    above_mean = []
    for loss in (wave, lambda x: wave(x) + slope @ x):
        values = [float(loss(s * a + t * b)) for s, t in make_grid(25)]
        above_mean.append(max(values) - (values[0] + values[-1]) / 2)
    assert abs(above_mean[0] - above_mean[1]) > 0.1


def permute(weights: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Return the weights of a net of two layers with its hidden units in another order."""
    found = {"0.weight": weights["0.weight"][order], "0.bias": weights["0.bias"][order]}
    return {**found, "2.weight": weights["2.weight"][:, order], "2.bias": weights["2.bias"]}


def test_permuted_hidden_units_give_a_barrier_and_aligned_ones_none() -> None:
    """Invariant 6."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x, y = draw(64, 3, seed=1), draw(64, 2, seed=2)
    for _ in range(200):
        net.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        for parameter in net.parameters():
            parameter.data -= 0.1 * parameter.grad  # type: ignore[operator]
    order = torch.tensor([3, 0, 1, 2, 7, 4, 5, 6])
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    second = permute(first, order)
    grid = make_grid(25)

    def measure() -> float:
        return float(nn.functional.mse_loss(net(x), y))

    losses = walk(net, (first, second), list(first), grid, measure)
    assert losses[-1] == pytest.approx(losses[0], rel=1e-12)
    assert max(measure_heights(losses, grid)) > 0.01
    aligned = permute(second, order.argsort())
    heights = measure_heights(walk(net, (first, aligned), list(first), grid, measure), grid)
    assert max(heights) == pytest.approx(0, abs=1e-14)


def test_a_finer_grid_never_lowers_the_barrier_and_25_points_miss_little() -> None:
    """Invariant 9."""
    a, b = draw(4, seed=8), draw(4, seed=9)
    coarse, fine = (max(heights_of(wave, a, b, points)) for points in (25, 49))
    assert fine >= coarse
    for top in torch.linspace(0.2, 0.8, 61).tolist():
        peaks = [1 - (t - top) ** 2 / max(top, 1 - top) ** 2 for _, t in make_grid(25)]
        assert 1 - max(peaks) <= 0.002


def test_the_standard_error_is_that_of_the_mean_height() -> None:
    losses = draw(3, 400, seed=1).abs()
    found = []
    for row in losses:
        rows = [{"loss": float(loss)} for loss in row]
        found.append(Evaluation({"loss": float(row.mean())}, rows))
    heights = losses[1] - (losses[0] + losses[2]) / 2
    assert estimate_error(found, make_grid(3), 1) == pytest.approx(float(heights.std()) / 20)


def test_batch_normalization_is_refused() -> None:
    subject: Any = SimpleNamespace(path="outputs/t/r")
    check_buffers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), subject)
    with pytest.raises(ConfigError, match=r"outputs/t/r has batch normalization \(1\)"):
        check_buffers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), subject)


SMALL = ("optimizer.lr=0.01", *TINY)
RUNS = {
    "full": ("method=full", *SMALL),
    "lora": ("method=lora", "method.targets=[q]", *SMALL),
    "shira": ("method=shira", "method.targets=[q]", *SMALL),
    "adapter": ("method=adapter", *SMALL),
    "deep": ("method=bitfit",),
}


class Runs(dict[str, Path]):
    """The runs of ``RUNS``, each trained when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = train_small(self.folder / name, *RUNS[name])
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def own(run: Path) -> dict[str, float]:
    """Return the numbers of the test set that a run reported when it was trained."""
    numbers: dict[str, float] = json.loads((run / "result.json").read_text())["metrics"]["test"]
    return numbers


def measure(runs: list[Path], **options: Any) -> Analyzed:
    return analyze(LinearModeConnectivity(**options), runs)


def test_the_ends_have_the_numbers_of_the_runs(runs: Runs) -> None:
    forward = measure([runs["full"], runs["lora"]], points=3)
    backward = measure([runs["lora"], runs["full"]], points=3)
    rows = forward.table.rows
    assert [row["alpha"] for row in rows] == [0, 0.5, 1]
    assert rows[0]["loss"] == own(runs["full"])["loss"]
    assert rows[-1]["loss"] == pytest.approx(own(runs["lora"])["loss"], rel=1e-5)
    assert (rows[0]["accuracy"], rows[-1]["accuracy"]) == (
        own(runs["full"])["accuracy"],
        own(runs["lora"])["accuracy"],
    )
    assert [row["loss"] for row in backward.table.rows] == [row["loss"] for row in rows][::-1]
    assert backward.table.summary["barrier"] == forward.table.summary["barrier"]
    assert forward.table.summary["distance"] > 0
    assert backward.table.summary["norm_first"] == forward.table.summary["norm_second"]


def test_a_run_and_itself_have_no_barrier(runs: Runs) -> None:
    found = measure([runs["lora"], runs["lora"]], points=3, layerwise=True).table
    assert found.summary["barrier"] == found.summary["distance"] == found.summary["accuracy_barrier"] == 0
    assert found.summary["connected"]
    assert found.details["layers"] == []


@pytest.mark.slow
def test_one_layer_at_a_time(runs: Runs) -> None:
    """Invariant 7: cross-entropy is convex in the head, so a head alone has no barrier beyond rounding."""
    found = measure([runs["lora"], runs["shira"]], points=3, layerwise=True).table
    layers = found.details["layers"]
    (projection,) = {layer["layer"] for layer in layers} - {"classifier"}
    assert projection.startswith("vit.layers.0.")
    head = [layer for layer in layers if layer["layer"] == "classifier"]
    assert [layer["others_at"] for layer in head] == ["first", "second"]
    assert max(layer["barrier"] for layer in head) < 1e-6
    assert found.summary["largest_layer_barrier"] == max(layer["barrier"] for layer in layers)


@pytest.mark.slow
def test_contract(runs: Runs) -> None:
    wrong = [[runs["full"], runs["adapter"]], [runs["deep"], runs["full"]]]
    check_analysis(LinearModeConnectivity(points=3), [runs["full"], runs["lora"]], wrong)
