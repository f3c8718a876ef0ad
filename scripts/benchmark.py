"""Step time and whole-process peak memory of SNELL beside its peers, and how fast the command line answers.

    python scripts/benchmark.py                 # everything, as a Markdown table on standard output
    python scripts/benchmark.py --rounds 3 --steps 4 --write docs/benchmarks.md

ViT-B/16 with random weights, batch 8, 224x224, float32, AdamW, all 72 linear layers of the blocks and the head trained. Every measurement is a
process of its own; the contestants take turns, round by round, so that a machine that drifts drifts for all. Step time: the median over a process's
steps after one warm-up step, then the median over rounds; memory: the kernel's own count of the process's peak (VmHWM), the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH, CLASSES = 8, 100
LABELS = {
    "full": "full fine-tuning, bare torch loop",
    "peft_lora": "peft LoRA r=16, bare torch loop",
    "reference": "SNELL-16, plain reference (cdist, torch.quantile, checkpointing)",
    "our_full": "`method=full`",
    "our_lora": "`method=lora method.rank=16`",
    "snell": "`method=snell method.rank=16`",
}


def vit_base() -> Any:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


def bare_steps(model: Any, steps: int) -> Iterator[float]:
    """The seconds of each step of the plainest loop over the parameters that require a gradient."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    model.train()
    for step in range(steps):
        pixels, labels = torch.randn(BATCH, 3, 224, 224), torch.arange(BATCH) + step
        began = time.perf_counter()
        torch.nn.functional.cross_entropy(model(pixels).logits, labels % CLASSES).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - began


def our_steps(method: Any, steps: int) -> Iterator[float]:
    """The seconds of each step of this package's own loop."""
    import torch

    from finetune.settings import OptimizerConfig, TrainConfig
    from finetune.train.batches import Batches
    from finetune.train.loop import Session
    from finetune.train.setup import make_accelerator

    class Noise(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return BATCH * steps

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"id": str(i), "pixel_values": torch.randn(3, 224, 224), "label": i % CLASSES}

    train = TrainConfig(steps=steps, batch_size=BATCH, clip=None, device="cpu")
    batches = Batches(Noise(), BATCH, None, 0)
    session = Session(
        vit_base(), method, ("classifier.weight", "classifier.bias"), batches, OptimizerConfig(lr=1e-4), train, 0, make_accelerator(train)
    )
    for step in session.steps():
        yield step.seconds


def reference_snell() -> Any:
    """What the method's authors compute, written plainly: both distances by cdist, the threshold by a sort, the whole branch checkpointed."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.utils.checkpoint import checkpoint

    from finetune.core.site import find_sites

    class Branch(nn.Module):
        def __init__(self, layer: nn.Linear, rank: int = 16, sparsity: float = 0.9) -> None:
            super().__init__()
            self.layer, self.sparsity = layer, sparsity
            self.cols = nn.Parameter(torch.empty(2, layer.in_features, rank // 2))
            self.rows = nn.Parameter(torch.empty(2, layer.out_features, rank // 2))
            nn.init.kaiming_uniform_(self.cols, a=5**0.5)
            nn.init.kaiming_uniform_(self.rows, a=5**0.5)

        def change(self, x: Tensor) -> Tensor:
            near, far = torch.cdist(self.cols, self.rows)
            kernel = 0.1 * near - 0.1 * far
            size = kernel.detach().abs()
            factor = torch.where(size > torch.quantile(size.flatten(), self.sparsity), size, 0)
            return F.linear(x, (kernel * factor).T)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + checkpoint(self.change, x, use_reentrant=False)

    model = vit_base().requires_grad_(False)
    for site in find_sites(model, ("all",)):
        owner, _, leaf = site.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Branch(site.module))
    model.classifier.requires_grad_(True)
    model.vit.embeddings.cls_token.requires_grad_(True)
    return model


def peft_lora() -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    model = inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=targets), vit_base())
    model.classifier.requires_grad_(True)
    return model


def contestant(name: str, steps: int) -> Iterator[float]:
    from finetune.methods.full import Full
    from finetune.methods.lora import LoRA
    from finetune.methods.snell import SNELL

    makers: dict[str, Callable[[], Iterator[float]]] = {
        "full": lambda: bare_steps(vit_base(), steps),
        "peft_lora": lambda: bare_steps(peft_lora(), steps),
        "reference": lambda: bare_steps(reference_snell(), steps),
        "our_full": lambda: our_steps(Full(), steps),
        "our_lora": lambda: our_steps(LoRA(rank=16), steps),
        "snell": lambda: our_steps(SNELL(rank=16, sparsity=0.9), steps),
    }
    return makers[name]()


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def one(name: str, steps: int, threads: int) -> None:
    """In a process of its own: train, and print the figures as JSON."""
    import torch

    torch.set_num_threads(threads)
    seconds = list(contestant(name, steps + 1))[1:]
    print(json.dumps({"seconds": statistics.median(seconds), "mib": peak_mib()}))


def measure(names: list[str], rounds: int, steps: int, threads: int) -> dict[str, dict[str, float]]:
    """Median seconds and MiB by contestant."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--steps", str(steps), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}: {name} {found[name][-1]}", file=sys.stderr, flush=True)
    return {name: {key: statistics.median(f[key] for f in runs) for key in ("seconds", "mib")} for name, runs in found.items()}


def answers(arguments: list[str], runs: int = 7) -> float:
    """The median seconds of a whole ``finetune`` command."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "finetune", *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def table(found: dict[str, dict[str, float]], rounds: int, steps: int, threads: int) -> str:
    lines = ["| what | s/step | peak MiB |", "|---|---|---|"]
    lines += [f"| {LABELS[name]} | {f['seconds']:.2f} | {f['mib']:.0f} |" for name, f in found.items()]

    def ratio(key: str, a: str, b: str) -> str:
        return f"{found[a][key] / found[b][key]:.2f}"

    lines += ["", "| figure | target | measured |", "|---|---|---|"]
    if {"snell", "peft_lora", "reference"} <= found.keys():
        lines += [
            f"| SNELL-16 peak memory / peft LoRA r=16 | at most 0.75 | {ratio('mib', 'snell', 'peft_lora')} |",
            f"| SNELL-16 step / peft LoRA r=16 | at most 2.0 | {ratio('seconds', 'snell', 'peft_lora')} |",
            f"| SNELL-16 step / plain reference | at most 0.3 | {ratio('seconds', 'snell', 'reference')} |",
        ]
    if {"our_full", "full"} <= found.keys():
        lines.append(f"| `method=full` step / bare torch loop | about 1 | {ratio('seconds', 'our_full', 'full')} |")
        lines.append(f"| `method=full` peak memory / bare torch loop | about 1 | {ratio('mib', 'our_full', 'full')} |")
    lines.append(f"| `finetune --help` | under 0.5 s | {answers(['--help']):.2f} s |")
    lines.append(f"| `finetune methods` | under 1 s | {answers(['methods']):.2f} s |")
    import torch

    return "\n".join(
        [
            *lines,
            "",
            f"{rounds} rounds of {steps} steps, {threads} threads, {platform.machine()}, torch {torch.__version__}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=LABELS, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, help="put the tables between the markers in this file")
    given = parser.parse_args()
    if given.one:
        one(given.one, given.steps, given.threads)
        return
    text = table(measure(given.only, given.rounds, given.steps, given.threads), given.rounds, given.steps, given.threads)
    print(text)
    if given.write:
        before, _, rest = given.write.read_text().partition("<!-- bench -->\n")
        given.write.write_text(f"{before}<!-- bench -->\n{text}\n<!-- /bench -->{rest.partition('<!-- /bench -->')[2]}")


if __name__ == "__main__":
    main()
