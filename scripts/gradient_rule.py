"""The measurements behind finetune/core/sparse/gradient.py: time of each way to the gradient of a few entries, and which one the rule takes.

    python scripts/gradient_rule.py                 # Markdown tables on standard output; some minutes

Milliseconds: the least of the rounds, in which the ways take turns; ``whole`` is the plain product gathered at the entries, with a temporary of the
weight's size; ``peak`` is the largest memory held at once beyond inputs and result. ``loss`` is what the rule's choice costs above the faster way.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is talkative

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from finetune.core.sparse.gradient import (
    CHUNK,
    _inside,
    _transposed,
    dense,
    entries_gradient,
    make_layout,
    read,
    sampled,
    sampled_pays,
    write_,
)

LAYERS = [
    (768, 768, 1576),
    (3072, 768, 1576),
    (768, 3072, 1576),
    (3072, 768, 197),
    (2048, 2048, 2048),
    (2048, 8192, 2048),
]
DENSITIES = [0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2]
Way = Callable[[], Tensor | None]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter


def least(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Milliseconds of each way."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = clock()
            way()
            best[name] = min(best[name], 1000 * (clock() - began))
    return best


def peak(way: Way) -> float:
    """MiB that ``way`` holds at most beyond its result, by torch's own account of its allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = way()
    held = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return (most - (0 if result is None else result.numel() * result.element_size())) / 2**20


def transposes(*sides: Tensor) -> None:
    """What ``sampled`` transposes, a chunk after the other."""
    memory = [torch.empty(CHUNK * side.shape[1]) for side in sides]
    for start in range(0, len(sides[0]), CHUNK):
        for side, room in zip(sides, memory, strict=True):
            _transposed(side[start : start + CHUNK].float(), room)


def scattered(out: int, in_: int, density: float) -> Tensor:
    return torch.randperm(out * in_)[: int(out * in_ * density)].sort().values.to(torch.int32)


def gradients(
    layers: list[tuple[int, int, int]], densities: list[float], rounds: int, dtype: torch.dtype
) -> None:
    print(
        "| weight, tokens | density | whole | dense | sampled | its transposes | rule | loss | peak MiB whole | dense | sampled |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for out, in_, tokens in layers:
        y, x = torch.randn(tokens, out).to(dtype), torch.randn(tokens, in_).to(dtype)
        for density in densities:
            index, size = scattered(out, in_, density), (out, in_)
            layout = make_layout(index, size)
            at, inner = _inside(index, size, layout), layout.size(size)
            args = (y, x, at, inner, layout.rows, layout.cols)
            ways: dict[str, Way] = {
                "whole": lambda y=y, x=x, index=index: (y.T @ x).view(-1)[index.long()],
                "dense": lambda args=args: dense(*args),
                "sampled": lambda args=args: sampled(*args),
            }
            mib = [peak(way) for way in ways.values()]
            ms = least({**ways, "transposes": lambda y=y, x=x: transposes(y, x)}, rounds)
            rule = "sampled" if sampled_pays(*inner, len(index)) else "dense"
            loss = ms[rule] / min(ms["dense"], ms["sampled"]) - 1
            cells = [
                f"{out}x{in_}, {tokens}",
                f"{density:.1%}",
                *(f"{v:.1f}" for v in ms.values()),
                rule,
                f"{loss:.0%}",
                *(f"{m:.1f}" for m in mib),
            ]
            print("|", " | ".join(cells), "|", flush=True)


def grains(rounds: int) -> None:
    """Sub-matrices of a 3072x768 weight, a tenth of the entries each."""
    out, in_, tokens = 3072, 768, 1576
    size = (out, in_)
    y, x, weight = torch.randn(tokens, out), torch.randn(tokens, in_), torch.randn(out, in_)
    rows, cols = torch.arange(out), torch.arange(in_)

    def grid(r: Tensor, c: Tensor) -> Tensor:
        return (r[:, None] * in_ + c).view(-1).to(torch.int32)

    cases = {
        "scattered": scattered(out, in_, 0.1),
        "rows": grid(torch.randperm(out)[: out // 10].sort().values, cols),
        "columns": grid(rows, torch.randperm(in_)[: in_ // 10].sort().values),
        "block": grid(rows[: out // 3], cols[: 3 * in_ // 10]),
        "half of a block": grid(rows[: out // 2], cols[: 4 * in_ // 10])[::2].contiguous(),
    }
    print("| entries | whole | entries_gradient | `flat[index]` | read | `flat[index] = v` | write_ |")
    print("|---|---|---|---|---|---|---|")
    flat = weight.view(-1)
    for name, index in cases.items():
        layout, values = make_layout(index, size), flat[index]
        ways: dict[str, Way] = {
            "whole": lambda index=index: (y.T @ x).view(-1)[index.long()],
            "gradient": lambda index=index, layout=layout: entries_gradient(y, x, index, size, layout),
            "get": lambda index=index: flat[index.long()],
            "read": lambda index=index, layout=layout: read(weight, index, layout),
            "set": lambda index=index, values=values: flat.index_put_((index.long(),), values),
            "write": lambda index=index, layout=layout, values=values: write_(weight, index, layout, values),
        }
        print(
            f"| {name} |", " | ".join(f"{v:.2f}" for v in least(ways, 3 * rounds).values()), "|", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="only the first so many")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time; with --threads 1 it is right on a busy machine too",
    )
    given = parser.parse_args()
    global clock
    clock = CLOCKS[given.clock]
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in runs
    gradients(LAYERS[: given.layers], DENSITIES, given.rounds, getattr(torch, given.dtype))
    print()
    grains(given.rounds)
    print(
        f"\n{given.rounds} rounds, {given.threads} threads, {given.clock} time, {platform.machine()}, {given.dtype}, torch {torch.__version__}."
    )


if __name__ == "__main__":
    main()
