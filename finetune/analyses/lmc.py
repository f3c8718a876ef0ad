"""Linear mode connectivity: the loss along the straight line between the merged weights of two runs.

The weights at ``alpha`` are (1 - alpha) times those of the first run plus alpha times those of the second,
heads included. They are formed in float64, rounded once to float32, and evaluated in float32 on the test set
of the first run: the same examples at every point, without dropout. The barrier is the largest height of the
loss above the straight line between the losses at the two ends.

Paper: "Landscaping Linear Mode Connectivity", arXiv 2406.16300, whose body was not available; the grid and
the second definition of the barrier (``barrier_above_mean``) are those of samuela/git-re-basin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ..artifacts.merge import fold
from ..core.analysis import Analysis, Curves, Need, Subject, Table
from ..core.attach import check_mergeable
from ..errors import ConfigError
from ..registry import register
from ..training.evaluate import Evaluation, evaluate
from ..training.prepare import Setup, make_accelerator

Weights = Mapping[str, Tensor]  # by the parameter's name
Point = tuple[float, float]  # the shares of the two ends, whose sum is 1
M = TypeVar("M")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONNECTED = 2.0  # standard errors; a smaller barrier counts as none


def make_grid(points: int) -> list[Point]:
    """Return ``points`` equidistant points, ends included; swapping the ends changes no bit of them."""
    last = points - 1
    return [((last - step) / last, step / last) for step in range(points)]


@torch.no_grad()
def walk(
    model: nn.Module,
    ends: tuple[Weights, Weights],
    moving: Sequence[str],
    grid: Sequence[Point],
    measure: Callable[[], M],
) -> list[M]:
    """Return the result of ``measure`` at each point of the line between two ends.

    ``moving``: the parameters that are interpolated; the others are those of the first end. The model keeps
    the weights of the last point.
    """
    first, second = ends
    found = []
    for of_first, of_second in grid:
        for name, parameter in model.named_parameters():
            if name in moving:
                mixed = of_first * first[name].double() + of_second * second[name].double()
                parameter.copy_(mixed)
            else:
                parameter.copy_(first[name])
        found.append(measure())
    return found


def measure_heights(values: Sequence[float], grid: Sequence[Point]) -> list[float]:
    """Return the height of each value above the straight line from the first value to the last.

    It is computed from differences, so that it is exactly 0 where a value equals both ends.
    """
    start, end = values[0], values[-1]
    heights = []
    for value, (of_first, of_second) in zip(values, grid, strict=True):
        heights.append(of_first * (value - start) + of_second * (value - end))
    return heights


def estimate_error(evaluations: Sequence[Evaluation], grid: Sequence[Point], place: int) -> float:
    """Return the standard error of the height of the loss at ``place``, over the examples of the test set."""
    losses = []
    for evaluation in (evaluations[0], evaluations[place], evaluations[-1]):
        losses.append([row["loss"] for row in evaluation.rows])
    heights = []
    for start, value, end in zip(*losses, strict=True):
        heights.append(grid[place][0] * (value - start) + grid[place][1] * (value - end))
    examples = len(heights)
    if examples < 2:
        return 0.0
    loss, scored = evaluations[place].metrics["loss"], float(examples)
    if loss:  # a language model's loss is a mean over tokens; that of an example is a sum
        scored = math.fsum(losses[1]) / loss
    mean = math.fsum(heights) / examples
    variance = math.fsum((height - mean) ** 2 for height in heights) / (examples - 1)
    return math.sqrt(examples * variance) / scored


@register("lmc")
@dataclass(frozen=True)
class LinearModeConnectivity(Analysis):
    """Linear mode connectivity: the loss barrier between two runs along a straight line.

    Options:
        points: Number of points on the line, ends included.
        layerwise: Also move the weights of one module at a time, once with all others from the first run and
            once with all others from the second. This takes 2 * ``points`` evaluations for each module.
    """

    runs: ClassVar[int] = 2
    needs: ClassVar[tuple[Need, ...]] = ("merge",)

    points: Annotated[int, Ge(3)] = 25
    layerwise: bool = False

    def __call__(self, *subjects: Subject) -> Table:
        """Measure the line between two runs, with a row for each point.

        Raises ``ConfigError`` if they differ in architecture, task or labels, or if the model has batch
        normalization.
        """
        first, second = subjects
        other = second.open()
        end, labels, dataset = read_merged(other), other.labels, other.config.dataset
        del other
        setup = first.open()
        start = read_merged(setup)
        check_alike((start, end), (setup.labels, labels), subjects)
        model = setup.session.model.float()
        check_buffers(model, first)
        accelerator = make_accelerator(replace(setup.config.train, precision="fp32"))

        def measure() -> Evaluation:
            return evaluate(model, setup.data["test"], setup.config.train.eval_batch_size, accelerator)

        grid = make_grid(self.points)
        found = walk(model, (start, end), list(start), grid, measure)
        table = _make_table(found, grid)
        summary = {**table.summary, **measure_distance(start, end)}
        notes = []
        if dataset != setup.config.dataset:
            notes.append(f"The runs have different data settings; the test set is that of {first.path}.")
        layers = []
        if self.layerwise:
            for name, ends in (("first", (start, end)), ("second", (end, start))):
                layers += _measure_layers(model, ends, name, grid, measure)
            summary["largest_layer_barrier"] = max((layer["barrier"] for layer in layers), default=0.0)
        return replace(table, summary=summary, details={"layers": layers}, notes=notes)


def read_merged(setup: Setup) -> dict[str, Tensor]:
    """Merge a run into its model, for good, and return a copy of all parameters, float32, on the CPU."""
    check_mergeable(setup.session.states)
    fold(setup, torch.float32)
    merged = {}
    for name, parameter in setup.session.model.named_parameters():
        merged[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    return merged


def check_alike(
    ends: tuple[Weights, Weights], labels: tuple[Sequence[str], Sequence[str]], subjects: Sequence[Subject]
) -> None:
    """Raise ``ConfigError`` unless two runs have equal labels, and parameters of equal names and shapes."""
    named = f"{subjects[0].path} and {subjects[1].path}"
    shapes = []
    for end in ends:
        shapes.append({name: tuple(tensor.shape) for name, tensor in end.items()})
    if list(labels[0]) != list(labels[1]):
        raise ConfigError(
            f"what=lmc: {named} have different labels ({list(labels[0])[:5]} and {list(labels[1])[:5]}), so "
            "one test set cannot measure both. Take two runs of one task."
        )
    if shapes[0] != shapes[1]:
        differing = sorted(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ConfigError(
            f"what=lmc: {named} have different architectures (first difference: {differing[0]}), so "
            "there is no line between them. Take two runs of one architecture."
        )


def check_buffers(model: nn.Module, subject: Subject) -> None:
    """Raise ``ConfigError`` if a model has batch normalization, whose statistics fit only one end."""
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            raise ConfigError(
                f"what=lmc: the model of {subject.path} has batch normalization ({name}), whose statistics "
                "would have to be measured again at every point. Take runs of a model without it."
            )


def measure_distance(first: Weights, second: Weights) -> dict[str, float]:
    """Return the norms of the weights of both ends, and of their difference."""
    sums = {"distance": 0.0, "norm_first": 0.0, "norm_second": 0.0}
    for name, start in first.items():
        end = second[name].double()
        sums["distance"] += float((end - start.double()).square().sum())
        sums["norm_first"] += float(start.double().square().sum())
        sums["norm_second"] += float(end.square().sum())
    return {name: math.sqrt(total) for name, total in sums.items()}


def _make_table(found: Sequence[Evaluation], grid: Sequence[Point]) -> Table:
    """Describe the line along which all weights moved."""
    losses = [evaluation.metrics["loss"] for evaluation in found]
    heights = measure_heights(losses, grid)
    place = max(range(len(grid)), key=lambda place: heights[place])
    error = estimate_error(found, grid, place)
    metric, sign = ("accuracy", -1) if "accuracy" in found[0].metrics else ("bits_per_byte", 1)
    scores = [evaluation.metrics[metric] for evaluation in found]
    rows = []
    for (_, alpha), loss, height, score in zip(grid, losses, heights, scores, strict=True):
        rows.append({"alpha": alpha, "loss": loss, "height": height, metric: score})
    summary = {
        "barrier": heights[place],
        "alpha": grid[place][1],
        "standard_error": error,
        "connected": heights[place] <= CONNECTED * error,
        "barrier_above_mean": max(losses) - (losses[0] + losses[-1]) / 2,
        f"{metric}_barrier": max(measure_heights([sign * score for score in scores], grid)),
    }
    alphas = [alpha for _, alpha in grid]
    chord = [loss - height for loss, height in zip(losses, heights, strict=True)]
    title = "loss between two runs"
    plot = Curves("loss", title, "alpha", "test loss", alphas, {"loss": losses, "line of the ends": chord})
    return Table(rows, summary, plots=[plot])


def _measure_layers(
    model: nn.Module,
    ends: tuple[Weights, Weights],
    fixed: str,
    grid: Sequence[Point],
    measure: Callable[[], Evaluation],
) -> list[dict[str, Any]]:
    """Return the barrier of each module whose own parameters differ, with all others at the first end."""
    layers: dict[str, list[str]] = {}
    for name in ends[0]:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    rows = []
    for layer, names in layers.items():
        if all(torch.equal(ends[0][name], ends[1][name]) for name in names):
            continue
        losses = [evaluation.metrics["loss"] for evaluation in walk(model, ends, names, grid, measure)]
        heights = measure_heights(losses, grid)
        alpha = grid[heights.index(max(heights))][1]
        rows.append({"layer": layer, "others_at": fixed, "barrier": max(heights), "alpha": alpha})
    return rows
