"""How long it takes to put a change into a model and take it out again: sparse changes beside LoRA, on the CPU.

    python scripts/switching.py                                # a Markdown table on standard output
    python scripts/switching.py --models vit_base vit_large --rounds 20 --write docs/benchmarks.md

Random weights of the named shapes, every linear layer of the blocks. Sparse: ``Switch.apply`` and ``revert``, which overwrite the same share of the
entries of each layer. LoRA, on the same layers, is fused and unfused in two ways: ``W += s * (B @ A)`` as it is usually written, with a temporary of
the size of W, and ``W.addmm_(B, A, alpha=s)``, the leanest that torch has. The contestants take turns; a time is the median over the rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
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
Act = Callable[[], object]


def make(name: str) -> Any:
    """A model with random weights; built without memory first, since transformers' own start is slow."""
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


def sparse(model: Any, sites: list[Site], share: float) -> Callable[[], tuple[Act, Act]]:
    """What makes, of the base as it stands, the two acts."""
    changes = {}
    for site in sites:
        index = (torch.rand(site.size) < share).nonzero().view(-1)
        changes[site.name] = SparseChange(index, 0.01 * torch.randn(len(index)))

    def ready() -> tuple[Act, Act]:
        switch = Switch(model)
        switch.load("it", changes)
        return lambda: switch.apply("it"), switch.revert

    return ready


def lora(sites: list[Site], rank: int, lean: bool) -> Callable[[], tuple[Act, Act]]:
    weights: list[Any] = [site.module.weight for site in sites]
    factors = [
        (
            0.01 * torch.randn(w.shape[0], rank, dtype=w.dtype),
            0.1 * torch.randn(rank, w.shape[1], dtype=w.dtype),
        )
        for w in weights
    ]

    def act(sign: float) -> None:
        for weight, (b, a) in zip(weights, factors, strict=True):
            if lean:
                weight.addmm_(b, a, alpha=sign * SCALE)
            else:
                weight += sign * SCALE * (b @ a)

    return lambda: (lambda: act(1.0), lambda: act(-1.0))


def seconds(act: Act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


@torch.no_grad()
def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant: median milliseconds in and out, and how far from the base the weights are after that."""
    torch.manual_seed(0)
    model = make(name)
    sites = find_sites(model, ("all",))
    weights: list[Any] = [site.module.weight for site in sites]
    base = [w.clone() for w in weights]  # to compare with in the first round, which is not timed
    contestants = {f"sparse, {share:.0%} of the entries": sparse(model, sites, share) for share in SHARES}
    for rank in RANKS:
        contestants |= {
            f"LoRA r={rank}, `{'W.addmm_' if lean else 'W += s * (B @ A)'}`": lora(sites, rank, lean)
            for lean in (False, True)
        }
    times: dict[str, list[tuple[float, float]]] = {what: [] for what in contestants}
    errors = dict.fromkeys(contestants, 0.0)
    for turn in range(rounds + 1):
        for what, ready in contestants.items():
            enter, leave = ready()
            taken = seconds(enter), seconds(leave)
            times[what] += [taken] if turn else []
            for w, b in zip(weights, base, strict=True) if not turn else ():
                errors[what] = max(errors[what], float((w - b).abs().max()))
                w.copy_(b)
    medians = {
        what: [1000 * statistics.median(t[i] for t in taken) for i in (0, 1)] for what, taken in times.items()
    }
    return [
        {"what": what, "enter": m[0], "leave": m[1], "both": sum(m), "error": errors[what]}
        for what, m in medians.items()
    ]


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Times, and how many times as long as the sparse ones each LoRA takes."""
    lines = [
        f"| {MODELS[name]} | in, ms | out, ms | both, ms | {' | '.join(f'against {share:.0%}' for share in SHARES)} | error after |",
        "|---|" + "---|" * (4 + len(SHARES)),
    ]
    for row in rows:
        ratios = [f"{row['both'] / rows[i]['both']:.1f}" for i in range(len(SHARES))]
        left = "none" if row["error"] == 0 else f"{row['error']:.1g}"
        lines.append(
            f"| {row['what']} | {row['enter']:.1f} | {row['leave']:.1f} | {row['both']:.1f} | {' | '.join(ratios)} | {left} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit_base", "llama"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="put the tables between the markers in this file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tables = [table(name, measure(name, given.rounds)) for name in given.models]
    about = f"Medians of {given.rounds} rounds; threads: {given.threads}; {platform.machine()}, torch {torch.__version__}."
    text = "\n\n".join([*tables, about])
    print(text)
    if given.write:
        before, mark, rest = given.write.read_text().partition("<!-- switching -->\n")
        if not mark:
            raise SystemExit(f"{given.write} has no line <!-- switching -->.")
        given.write.write_text(
            f"{before}{mark}{text}\n<!-- /switching -->{rest.partition('<!-- /switching -->')[2]}"
        )


if __name__ == "__main__":
    main()
