"""Measure step time and peak memory of SNELL and the sparse engine beside other methods, and start-up time.

    python scripts/benchmark.py                 # one table, as Markdown on standard output
    python scripts/benchmark.py --table sparse --steps 9 --write docs/benchmarks.md
    python scripts/benchmark.py --table sparse --only sparse99 s2ft --against OTHER_CHECKOUT

The model is ViT-B/16 with random weights at batch 8, 224x224, float32, AdamW. All 72 linear layers of the
blocks and the head are trained. Every contestant runs in its own process, and they take turns step by step,
so that a drift of the machine affects all of them. Step time is the median over the turns, after one step to
warm up. A ratio is the median over turns of the ratio within a turn, with its quartiles. Memory is the peak
of the process as the kernel counts it (VmHWM).
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCH, CLASSES = 8, 100
LABELS = {
    "full": "full fine-tuning, bare torch loop",
    "peft_lora": "peft LoRA r=16, bare torch loop",
    "reference": "SNELL-16, plain reference (cdist, torch.quantile, checkpointing)",
    "our_full": "`method=full`",
    "our_lora": "`method=lora method.rank=16`",
    "snell": "`method=snell method.rank=16`",
    "peft_lora8": "peft LoRA r=8, bare torch loop",
    "peft_super": "peft Super-Tuning, sparsity 0.99, bare torch loop",
    "sparse99": "`method=super_tuning sparsity=0.99`",
    "sparse90": "`method=sparse sparsity=0.9`",
    "s2ft": "`method=s2ft method.d=0.03` (1 % of all)",
}
CURVE = (0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8)
LABELS |= {f"curve{s}": f"`method=sparse sparsity={s:g}`" for s in CURVE}
TABLES = {
    "snell": ["full", "peft_lora", "reference", "our_full", "our_lora", "snell"],
    "sparse": ["full", "peft_lora8", "peft_super", "sparse99", "sparse90", "s2ft"],
    "curve": [f"curve{s}" for s in CURVE],
}
FIGURES = [  # what is compared, target, figure, our contestant, the other contestant
    ("SNELL-16 peak memory / peft LoRA r=16", "at most 0.75", "mib", "snell", "peft_lora"),
    ("SNELL-16 step / peft LoRA r=16", "at most 2.0", "seconds", "snell", "peft_lora"),
    ("SNELL-16 step / plain reference", "at most 0.3", "seconds", "snell", "reference"),
    ("`method=full` step / bare torch loop", "about 1", "seconds", "our_full", "full"),
    ("`method=full` peak memory / bare torch loop", "about 1", "mib", "our_full", "full"),
    ("sparsity 0.99 step / peft LoRA r=8", "at most 1.05", "seconds", "sparse99", "peft_lora8"),
    ("sparsity 0.99 peak memory / peft LoRA r=8", "at most 0.72", "mib", "sparse99", "peft_lora8"),
    ("sparsity 0.99 step / peft Super-Tuning 0.99", "at most 0.88", "seconds", "sparse99", "peft_super"),
    ("sparsity 0.99 peak memory / peft Super-Tuning 0.99", "at most 0.95", "mib", "sparse99", "peft_super"),
    ("sparsity 0.9 step / full fine-tuning, bare loop", "at most 1.0", "seconds", "sparse90", "full"),
    ("sparsity 0.9 peak memory / full fine-tuning, bare loop", "at most 0.85", "mib", "sparse90", "full"),
    ("S2FT, 1 % step / peft LoRA r=8", "at most 0.85", "seconds", "s2ft", "peft_lora8"),
    ("S2FT, 1 % peak memory / peft LoRA r=8", "at most 0.65", "mib", "s2ft", "peft_lora8"),
]


def make_vit_base() -> Any:
    """Return ViT-B/16 with random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


def run_bare_steps(model: Any, steps: int) -> Iterator[float]:
    """Train the parameters that require a gradient in a plain loop; yield the seconds of each step."""
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


def run_our_steps(method: Any, steps: int) -> Iterator[float]:
    """Train by this package's own loop; yield the seconds of each step."""
    import torch

    from finetune.config.settings import TrainConfig
    from finetune.optim.adamw import AdamW
    from finetune.training.batches import Batches
    from finetune.training.build import Pretrained
    from finetune.training.prepare import make_accelerator
    from finetune.training.session import Recipe, Session

    class Noise(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return BATCH * steps

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"id": str(i), "pixel_values": torch.randn(3, 224, 224), "label": i % CLASSES}

    train = TrainConfig(steps=steps, batch_size=BATCH, clip=None, device="cpu")
    data: Any = Noise()
    batches = Batches(data, BATCH, None, 0)
    pretrained = Pretrained(make_vit_base(), ("classifier.weight", "classifier.bias"))
    recipe = Recipe(method, AdamW(lr=1e-4), train, seed=0)
    session = Session(pretrained, recipe, batches, make_accelerator(train))
    for step in session.steps():
        yield step.seconds


def make_reference_snell() -> Any:
    """Return SNELL written plainly, as its authors compute it.

    Both distances are by cdist, the threshold is by a sort, and the whole branch is checkpointed.
    """
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

    model = make_vit_base().requires_grad_(False)
    for site in find_sites(model, ("all",)):
        owner, _, leaf = site.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Branch(site.module))
    model.classifier.requires_grad_(True)
    model.vit.embeddings.cls_token.requires_grad_(True)
    return model


def make_peft_model(kind: str, **settings: Any) -> Any:
    """Return ViT-B/16 with an adapter of peft and a trained head."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    model = peft.inject_adapter_in_model(
        getattr(peft, kind)(target_modules=targets, **settings), make_vit_base()
    )
    model.classifier.requires_grad_(True)
    return model


def run_contestant(name: str, steps: int) -> Iterator[float]:
    """Train the named contestant; yield the seconds of each step."""
    from finetune.methods.baseline.full import Full
    from finetune.methods.reparam.lora import LoRA
    from finetune.methods.reparam.snell import SNELL
    from finetune.methods.sparse.s2ft import S2FT
    from finetune.methods.sparse.sparse import Crossing
    from finetune.methods.sparse.super_tuning import SuperTuning

    if name.startswith("curve"):
        return run_our_steps(Crossing(sparsity=float(name.removeprefix("curve"))), steps)
    methods = {
        "our_full": Full(),
        "our_lora": LoRA(rank=16),
        "snell": SNELL(rank=16, sparsity=0.9),
        "sparse99": SuperTuning(sparsity=0.99),
        "sparse90": Crossing(sparsity=0.9),
        "s2ft": S2FT(d=0.03),
    }
    if name in methods:
        return run_our_steps(methods[name], steps)
    if name == "full":
        return run_bare_steps(make_vit_base(), steps)
    if name == "reference":
        return run_bare_steps(make_reference_snell(), steps)
    if name == "peft_super":
        return run_bare_steps(make_peft_model("SupertuningConfig", sparsity=0.99), steps)
    rank = {"peft_lora": 16, "peft_lora8": 8}[name]
    return run_bare_steps(make_peft_model("LoraConfig", r=rank, lora_alpha=rank), steps)


def read_peak_mib() -> float:
    """Return the peak memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve_steps(name: str, steps: int, threads: int) -> None:
    """Do a step to warm up and one for each line on standard input; print the figures of each as JSON.

    This runs in the process of a contestant.
    """
    import torch

    torch.set_num_threads(threads)
    for seconds in run_contestant(name, steps + 1):
        print(json.dumps({"seconds": seconds, "mib": read_peak_mib()}), flush=True)
        if not sys.stdin.readline():  # the measuring process has closed the pipe
            return


def measure(
    names: list[str], steps: int, threads: int, against: Path | None = None
) -> dict[str, dict[str, list[float]]]:
    """Return, for each contestant, the seconds of each step and the peak in MiB so far.

    Only one contestant computes at a time. With ``against``, another checkout of this project, each
    contestant also runs there, under its name followed by ``(other)``.
    """
    running = {}
    for name in names:
        running[name] = _start(name, ROOT, steps, threads)
        if against:
            running[f"{name} (other)"] = _start(name, against.resolve(), steps, threads)
    names = list(running)
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "mib": []} for name in names}
    for turn in range(steps):
        for name, process in running.items():
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
            for key, value in _read_answer(process).items():
                found[name][key].append(value)
        seconds = [f"{name} {figures['seconds'][-1]:.2f}" for name, figures in found.items()]
        print(f"turn {turn + 1}:", *seconds, file=sys.stderr, flush=True)
    for process in running.values():
        process.communicate()
    return found


def _start(name: str, root: Path, steps: int, threads: int) -> subprocess.Popen[str]:
    """Start a contestant with the code of the checkout ``root`` and wait for its first step."""
    options = ["--one", name, "--steps", str(steps), "--threads", str(threads)]
    process = subprocess.Popen(
        [sys.executable, str(root / "scripts" / "benchmark.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _read_answer(process)
    return process


def _read_answer(process: Any) -> dict[str, float]:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"A contestant ended with code {process.wait()}: {' '.join(process.args)}")
    answer: dict[str, float] = json.loads(line)
    return answer


def time_command(arguments: list[str], runs: int = 7) -> float:
    """Return the median seconds of a whole ``finetune`` command."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "finetune", *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def write_table(found: dict[str, dict[str, list[float]]], threads: int) -> str:
    """Return the measurements as Markdown, with the ratios that have a target."""
    import torch

    lines = ["| what | s/step | peak MiB |", "|---|---|---|"]
    for name, figures in found.items():
        lines.append(
            f"| {LABELS[name]} | {statistics.median(figures['seconds']):.2f} | {figures['mib'][-1]:.0f} |"
        )
    ratios = []
    for what, target, key, ours, theirs in FIGURES:
        if ours in found and theirs in found:
            ratios.append(f"| {what} | {target} | {show_ratio(found[ours][key], found[theirs][key])} |")
    if ratios:
        lines += ["", "| figure | target | measured |", "|---|---|---|", *ratios]
    if "our_full" in found:
        lines.append(f"| `finetune --help` | under 0.5 s | {time_command(['--help']):.2f} s |")
        lines.append(f"| `finetune methods` | under 1 s | {time_command(['methods']):.2f} s |")
    turns = len(next(iter(found.values()))["seconds"])
    machine = f"{threads} threads, {platform.machine()}, torch {torch.__version__}"
    return "\n".join([*lines, "", f"{turns} turns of one step each, {machine}."])


def write_comparison(found: dict[str, dict[str, list[float]]]) -> str:
    """Return this checkout's figures over those of the other one, as Markdown."""
    lines = ["| what | step, this / other | peak memory, this / other |", "|---|---|---|"]
    for name, figures in found.items():
        if name in LABELS:
            other = found[f"{name} (other)"]
            ratios = [show_ratio(figures[key], other[key]) for key in ("seconds", "mib")]
            lines.append(f"| {LABELS[name]} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines)


def show_ratio(ours: list[float], theirs: list[float]) -> str:
    """Return the median over turns of the ratio within a turn, and the quartiles if they differ."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    if f"{low:.2f}" == f"{high:.2f}":
        return f"{middle:.2f}"
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure the contestants of a table, print the table, and write it into a file if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", choices=LABELS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--table",
        choices=TABLES,
        default="snell",
        help="the contestants to measure, and the table to replace in the file of --write",
    )
    parser.add_argument("--only", nargs="+", choices=LABELS, help="only these contestants")
    parser.add_argument("--steps", type=int, default=9, help="number of turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, help="put the tables between the markers in this file")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="another checkout of this project, whose code takes turns with this one's",
    )
    given = parser.parse_args()
    if given.one:
        serve_steps(given.one, given.steps, given.threads)
        return
    names = [name for name in TABLES[given.table] if name in (given.only or TABLES[given.table])]
    if given.against:
        print(write_comparison(measure(names, given.steps, given.threads, given.against)))
        return
    text = write_table(measure(names, given.steps, given.threads), given.threads)
    print(text)
    if given.write:
        start, end = f"<!-- {given.table} -->\n", f"<!-- /{given.table} -->"
        before, _, rest = given.write.read_text().partition(start)
        given.write.write_text(f"{before}{start}{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
