"""Measure how long it takes on the CPU to put a sparse change or LoRA into a model and to take it out.

    python scripts/switching.py                                # Markdown tables on standard output
    python scripts/switching.py --models vit_base vit_large --rounds 20 --write docs/benchmarks.md

The models have random weights, and every linear layer of the blocks is changed. Sparse changes use
``Switch.apply`` and ``revert``, which overwrite the same share of the entries of each layer. LoRA is fused
into the same layers and unfused in two ways: ``W += s * (B @ A)``, as it is usually written, with a temporary
of the size of W, and ``W.addmm_(B, A, alpha=s)``, which needs the least memory in torch. The contestants take
turns; a time is the median over the rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.core.changes import SparseChange
from finetune.core.site import Site, find_sites
from finetune.core.sparse.switch import Switch

SHARES, RANKS, SCALE = (0.01, 0.02), (8, 16, 32), 2.0
MODELS = {
    "vit_base": "ViT-B/16, float32",
    "vit_large": "ViT-L/16, float32",
    "llama": "Llama 3.2 1B, 4 of its 16 blocks, bfloat16",
}
Action = Callable[[], object]
Prepare = Callable[[], tuple[Action, Action]]  # returns the actions that put a change in and take it out


def make_model(name: str) -> Any:
    """Return a model with random weights.

    It is built on the meta device first, because the initialization by transformers is slow.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        if name == "llama":
            sizes = {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 4,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            }
            model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).to(torch.bfloat16)
        elif name == "vit_large":
            sizes = {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            }
            model = ViTForImageClassification(ViTConfig(**sizes))
        else:
            model = ViTForImageClassification(ViTConfig())
    model = model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.1, 0.1)
    return model


def make_sparse(model: Any, sites: list[Site], share: float) -> Prepare:
    """Return a function that loads a sparse change of this share of the entries into the model as it is."""
    changes = {}
    for site in sites:
        index = (torch.rand(site.size) < share).nonzero().view(-1)
        changes[site.name] = SparseChange(index, 0.01 * torch.randn(len(index)))

    def prepare() -> tuple[Action, Action]:
        switch = Switch(model)
        switch.load("change", changes)
        return partial(switch.apply, "change"), switch.revert

    return prepare


def make_lora(sites: list[Site], rank: int, in_place: bool) -> Prepare:
    """Return a function that prepares a LoRA change; ``in_place`` uses ``addmm_``, without a temporary."""
    weights: list[Any] = [site.module.weight for site in sites]
    factors = []
    for weight in weights:
        b = 0.01 * torch.randn(weight.shape[0], rank, dtype=weight.dtype)
        factors.append((b, 0.1 * torch.randn(rank, weight.shape[1], dtype=weight.dtype)))

    def add(sign: float) -> None:
        for weight, (b, a) in zip(weights, factors, strict=True):
            if in_place:
                weight.addmm_(b, a, alpha=sign * SCALE)
            else:
                weight += sign * SCALE * (b @ a)

    def prepare() -> tuple[Action, Action]:
        return partial(add, 1.0), partial(add, -1.0)

    return prepare


def time_action(action: Action) -> float:
    """Return the seconds that an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@torch.no_grad()
def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each contestant.

    A row has the median milliseconds to put the change in and to take it out, and the largest difference of
    the weights from the base afterwards.
    """
    torch.manual_seed(0)
    model = make_model(name)
    sites = find_sites(model, ("all",))
    weights: list[Any] = [site.module.weight for site in sites]
    contestants = {
        f"sparse, {share:.0%} of the entries": make_sparse(model, sites, share) for share in SHARES
    }
    for rank in RANKS:
        contestants[f"LoRA r={rank}, `W += s * (B @ A)`"] = make_lora(sites, rank, in_place=False)
        contestants[f"LoRA r={rank}, `W.addmm_`"] = make_lora(sites, rank, in_place=True)
    errors = {}
    base = [weight.clone() for weight in weights]
    for what, prepare in contestants.items():  # an untimed round
        put_in, take_out = prepare()
        put_in()
        take_out()
        differences = [float((w - b).abs().max()) for w, b in zip(weights, base, strict=True)]
        errors[what] = max(differences)
        for weight, original in zip(weights, base, strict=True):
            weight.copy_(original)
    times_in: dict[str, list[float]] = {what: [] for what in contestants}
    times_out: dict[str, list[float]] = {what: [] for what in contestants}
    for _ in range(rounds):
        for what, prepare in contestants.items():
            put_in, take_out = prepare()
            times_in[what].append(time_action(put_in))
            times_out[what].append(time_action(take_out))
    rows = []
    for what, error in errors.items():
        ms_in = 1000 * statistics.median(times_in[what])
        ms_out = 1000 * statistics.median(times_out[what])
        rows.append({"what": what, "in": ms_in, "out": ms_out, "both": ms_in + ms_out, "error": error})
    return rows


def write_table(name: str, rows: list[dict[str, Any]]) -> str:
    """Return the times as Markdown, with the ratio of each time to those of the sparse changes."""
    shares = [f"against {share:.0%}" for share in SHARES]
    lines = [
        f"| {MODELS[name]} | in, ms | out, ms | both, ms | {' | '.join(shares)} | error after |",
        "|---|" + "---|" * (4 + len(SHARES)),
    ]
    sparse_times = [row["both"] for row in rows[: len(SHARES)]]
    for row in rows:
        ratios = " | ".join(f"{row['both'] / time:.1f}" for time in sparse_times)
        error = "none" if row["error"] == 0 else f"{row['error']:.1g}"
        times = f"{row['in']:.1f} | {row['out']:.1f} | {row['both']:.1f}"
        lines.append(f"| {row['what']} | {times} | {ratios} | {error} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every model, print the tables, and write them into a file if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit_base", "llama"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="put the tables between the markers in this file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tables = [write_table(name, measure(name, given.rounds)) for name in given.models]
    machine = f"threads: {given.threads}; {platform.machine()}, torch {torch.__version__}"
    about = f"Medians of {given.rounds} rounds; {machine}."
    text = "\n\n".join([*tables, about])
    print(text)
    if given.write:
        before, mark, rest = given.write.read_text().partition("<!-- switching -->\n")
        if not mark:
            raise SystemExit(f"{given.write} has no line <!-- switching -->.")
        after = rest.partition("<!-- /switching -->")[2]
        given.write.write_text(f"{before}{mark}{text}\n<!-- /switching -->{after}")


if __name__ == "__main__":
    main()
