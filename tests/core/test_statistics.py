"""Statistics of sites against explicit products and autograd, in float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.core.site import Site
from finetune.core.statistics import SiteStatistics, StatisticName, gather_statistics
from finetune.errors import ConfigError
from finetune.testing import ranks

ALL: tuple[StatisticName, ...] = get_args(StatisticName)


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    labels: Tensor = field(default_factory=lambda: torch.empty(0))


class Net(nn.Module):
    """Two linear layers over tokens; the second sees what the first made, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        hidden += 1
        out: Tensor = self.second(hidden.tanh())
        return out


def make(frozen: bool = True) -> tuple[Net, list[Site]]:
    net = Net().double().requires_grad_(not frozen)
    sites = [Site("first", net.first, 0, "q", (5, 4)), Site("second", net.second, 0, "v", (3, 5))]
    return net, sites


def some_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for n, length in ((3, 4), (1, 2), (2, 5)):
        x = torch.randn(n, length, 4, generator=generator, dtype=torch.float64)
        mask = torch.ones(n, length, dtype=torch.int64)
        mask[0, length - 1] = 0
        found.append(Batch({"x": x, "attention_mask": mask}))
    return found


def loss_of(net: Net, batch: Batch) -> Tensor:
    """A sum over the tokens that are no padding."""
    out = net(**batch.inputs)
    return (out.square().sum(-1) * batch.inputs["attention_mask"]).sum()


def gather(names: tuple[StatisticName, ...], batches: list[Any]) -> dict[str, SiteStatistics]:
    net, sites = make()
    return gather_statistics(net, sites, names, batches, lambda batch: loss_of(net, batch), torch.float64)


def rows_of(net: Net, batches: list[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """The inputs and outputs of each site over all tokens but padding, computed without hooks."""
    found: dict[str, list[Tensor]] = {"first": [], "hidden": [], "second": [], "out": []}
    with torch.no_grad():
        for batch in batches:
            x = batch.inputs["x"][batch.inputs["attention_mask"].bool()]
            hidden = net.first(x)
            second = (hidden + 1).tanh()
            for name, rows in zip(found, (x, hidden, second, net.second(second)), strict=True):
                found[name].append(rows)
    whole = {name: torch.cat(rows) for name, rows in found.items()}
    return {"first": (whole["first"], whole["hidden"]), "second": (whole["second"], whole["out"])}


def test_features_of_inputs_and_outputs() -> None:
    net, _ = make()
    batches = some_batches()
    found = gather(ALL, batches)
    for name, sides in rows_of(net, batches).items():
        statistics = found[name]
        assert statistics.tokens == len(sides[0]) == 12 + 2 + 10 - 3
        for side, rows in zip(("input", "output"), sides, strict=True):
            expected = {
                "squares": (rows**2).sum(0),
                "gram": rows.T @ rows,
                "sum": rows.sum(0),
                "abs": rows.abs().sum(0),
                "max": rows.abs().max(0).values,
            }
            for what, value in expected.items():
                torch.testing.assert_close(statistics.values[f"{side}_{what}"], value)
        torch.testing.assert_close(statistics.mean(), sides[0].mean(0))
        torch.testing.assert_close(statistics.mean("output"), sides[1].mean(0))


def test_gradients_and_their_squares_are_those_of_autograd() -> None:
    batches = some_batches()
    found = gather(("gradient", "gradient_squares"), batches)
    net, sites = make(frozen=False)
    weights = [net.first.weight, net.second.weight]
    whole = torch.autograd.grad(sum(loss_of(net, batch) for batch in batches), weights)  # type: ignore[arg-type]
    squares = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        for i in range(len(batch.inputs["x"])):
            one = Batch({name: tensor[i : i + 1] for name, tensor in batch.inputs.items()})
            for total, grad in zip(squares, torch.autograd.grad(loss_of(net, one), weights), strict=True):
                total += grad**2
    for site, gradient, square in zip(sites, whole, squares, strict=True):
        torch.testing.assert_close(found[site.name]["gradient"], gradient)
        torch.testing.assert_close(found[site.name]["gradient_squares"], square)


def test_the_cut_into_batches_does_not_matter() -> None:
    first, last = some_batches()[0], some_batches()[2]
    whole = gather(ALL, [first, last])
    parts: list[Any] = [last, None]
    for i in range(3):
        parts.append(Batch({name: tensor[i : i + 1] for name, tensor in first.inputs.items()}))
    for name, statistics in gather(ALL, parts).items():
        assert statistics.tokens == whole[name].tokens
        for key, value in statistics.values.items():
            torch.testing.assert_close(value, whole[name].values[key])


def test_sums_of_a_bfloat16_model_are_float32() -> None:
    net, sites = make()
    net.bfloat16()
    x = torch.full((3, 1337, 4), 1.0, dtype=torch.bfloat16)
    found = gather_statistics(net, sites, ("input_squares",), [Batch({"x": x})])
    assert found["first"]["input_squares"].tolist() == [4011.0] * 4  # bfloat16 has no 4011


def test_hooks_are_removed_and_the_mode_restored_after_an_error() -> None:
    net, sites = make()
    net.train()

    def fail(batch: Batch) -> Tensor:
        net(**batch.inputs)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gather_statistics(net, sites, ALL, some_batches(), fail)
    assert net.training
    for module in net.modules():
        assert not module._forward_hooks
    assert all(parameter.grad is None for parameter in net.parameters())


def test_squared_gradients_of_a_layer_that_runs_twice_are_refused() -> None:
    net, _ = make()
    net.first = net.second = nn.Linear(4, 4).double().requires_grad_(False)
    site = Site("first", net.first, 0, "q", (4, 4))
    with pytest.raises(ConfigError, match=r"first .* runs more than once"):
        gather_statistics(
            net, [site], ("gradient_squares",), some_batches(), lambda batch: loss_of(net, batch)
        )


def stored(batches: list[Any]) -> dict[str, Tensor]:
    found = {}
    for name, statistics in gather(ALL, batches).items():
        found[f"{name}/tokens"] = torch.tensor(statistics.tokens)
        found |= {f"{name}/{key}": value.contiguous() for key, value in statistics.values.items()}
    return found


@pytest.mark.processes
def test_two_processes_add_up_to_one(tmp_path: Path) -> None:
    """The first has two batches, and the second one."""
    alone = stored(some_batches())
    for found in ranks.run(__file__, tmp_path):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    first, second, third = some_batches()
    parts: list[list[Any]] = [[first, third], [None, second]]
    save_file(stored(parts[dist.get_rank()]), sys.argv[1])
