"""Measure the algorithms of finetune/core/sparse/gradient.py, and check the rule that chooses between them.

    python scripts/gradient_rule.py                 # Markdown tables on standard output; takes some minutes

Each algorithm computes the gradient of some entries of a weight. ``whole`` computes the full product and
gathers the entries, so it needs a temporary of the weight's size. The algorithms take turns; a time is the
minimum over the rounds, in milliseconds. ``peak`` is the largest memory in use beyond inputs and result.
``loss`` is how much slower the algorithm that the rule chooses is than the faster one.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler

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
Algorithm = Callable[[], Tensor | None]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def time_each(algorithms: dict[str, Algorithm], rounds: int, clock: Clock) -> dict[str, float]:
    """Return the minimum milliseconds of each algorithm, after a round to warm up."""
    best = dict.fromkeys(algorithms, float("inf"))
    for _ in range(rounds + 1):
        for name, compute in algorithms.items():
            began = clock()
            compute()
            best[name] = min(best[name], 1000 * (clock() - began))
    return best


def measure_peak(compute: Algorithm) -> float:
    """Return the MiB that an algorithm uses at most beyond its result, according to torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = compute()
    in_use = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            in_use += event.nbytes()
            most = max(most, in_use)
    if result is not None:
        most -= result.numel() * result.element_size()
    return most / 2**20


def transpose_chunks(*sides: Tensor) -> None:
    """Transpose the inputs chunk by chunk, as ``sampled`` does."""
    buffers = [torch.empty(CHUNK * side.shape[1]) for side in sides]
    for start in range(0, len(sides[0]), CHUNK):
        for side, buffer in zip(sides, buffers, strict=True):
            _transposed(side[start : start + CHUNK].float(), buffer)


def choose_scattered(out: int, in_: int, density: float) -> Tensor:
    """Return sorted random places of a weight, int32."""
    return torch.randperm(out * in_)[: int(out * in_ * density)].sort().values.to(torch.int32)


def compare_densities(
    layers: list[tuple[int, int, int]], densities: list[float], rounds: int, dtype: torch.dtype, clock: Clock
) -> None:
    """Print a table of the algorithms for scattered entries, by layer and density."""
    times = "whole | dense | sampled | its transposes"
    print(f"| weight, tokens | density | {times} | rule | loss | peak MiB whole | dense | sampled |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for out, in_, tokens in layers:
        y, x = torch.randn(tokens, out).to(dtype), torch.randn(tokens, in_).to(dtype)
        for density in densities:
            index, size = choose_scattered(out, in_, density), (out, in_)
            layout = make_layout(index, size)
            at, inner = _inside(index, size, layout), layout.size(size)
            args = (y, x, at, inner, layout.rows, layout.cols)
            algorithms: dict[str, Algorithm] = {
                "whole": partial(gather_from_product, y, x, index),
                "dense": partial(dense, *args),
                "sampled": partial(sampled, *args),
            }
            mib = [f"{measure_peak(compute):.1f}" for compute in algorithms.values()]
            ms = time_each({**algorithms, "transposes": partial(transpose_chunks, y, x)}, rounds, clock)
            rule = "sampled" if sampled_pays(*inner, len(index)) else "dense"
            loss = ms[rule] / min(ms["dense"], ms["sampled"]) - 1
            times = [f"{value:.1f}" for value in ms.values()]
            cells = [f"{out}x{in_}, {tokens}", f"{density:.1%}", *times, rule, f"{loss:.0%}", *mib]
            print("|", " | ".join(cells), "|", flush=True)


def gather_from_product(y: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Compute the gradient of the whole weight, and gather the entries."""
    return (y.T @ x).view(-1)[index.long()]


def list_grid(rows: Tensor, cols: Tensor, in_: int) -> Tensor:
    """Return the places of a sub-matrix, int32."""
    return (rows[:, None] * in_ + cols).view(-1).to(torch.int32)


def compare_shapes(rounds: int, clock: Clock) -> None:
    """Print a table for sub-matrices of a 3072x768 weight, with a tenth of the entries each."""
    out, in_, tokens = 3072, 768, 1576
    size = (out, in_)
    y, x, weight = torch.randn(tokens, out), torch.randn(tokens, in_), torch.randn(out, in_)
    rows, cols = torch.arange(out), torch.arange(in_)
    cases = {
        "scattered": choose_scattered(out, in_, 0.1),
        "rows": list_grid(torch.randperm(out)[: out // 10].sort().values, cols, in_),
        "columns": list_grid(rows, torch.randperm(in_)[: in_ // 10].sort().values, in_),
        "block": list_grid(rows[: out // 3], cols[: 3 * in_ // 10], in_),
        "half of a block": list_grid(rows[: out // 2], cols[: 4 * in_ // 10], in_)[::2].contiguous(),
    }
    print("| entries | whole | entries_gradient | `flat[index]` | read | `flat[index] = v` | write_ |")
    print("|---|---|---|---|---|---|---|")
    flat = weight.view(-1)
    for name, index in cases.items():
        layout, values = make_layout(index, size), flat[index]
        algorithms: dict[str, Algorithm] = {
            "whole": partial(gather_from_product, y, x, index),
            "gradient": partial(entries_gradient, y, x, index, size, layout),
            "get": partial(get_entries, flat, index),
            "read": partial(read, weight, index, layout),
            "set": partial(set_entries, flat, index, values),
            "write": partial(write_, weight, index, layout, values),
        }
        times = [f"{ms:.2f}" for ms in time_each(algorithms, 3 * rounds, clock).values()]
        print(f"| {name} |", " | ".join(times), "|", flush=True)


def get_entries(flat: Tensor, index: Tensor) -> Tensor:
    """Read entries by plain indexing."""
    return flat[index.long()]


def set_entries(flat: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write entries by plain indexing."""
    return flat.index_put_((index.long(),), values)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--layers", type=int, default=len(LAYERS), help="measure only the first so many layers"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, which with --threads 1 is right on a busy machine, too",
    )
    given = parser.parse_args()
    clock = CLOCKS[given.clock]
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in runs
    dtype = getattr(torch, given.dtype)
    compare_densities(LAYERS[: given.layers], DENSITIES, given.rounds, dtype, clock)
    print()
    compare_shapes(given.rounds, clock)
    machine = f"{platform.machine()}, {given.dtype}, torch {torch.__version__}"
    print(f"\n{given.rounds} rounds, {given.threads} threads, {given.clock} time, {machine}.")


if __name__ == "__main__":
    main()
