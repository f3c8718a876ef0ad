"""Make the frozen runs: tiny runs of every method, with a checkpoint in their middle.

This script was run once, at commit 0c0ceea, and is never run again. Later versions only read ``runs`` and
``recorded.json``; the script stays as the description of what was run. A method that joins later gets no
frozen run.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/frozen/make.py

Each run takes 8 steps and stores a checkpoint at step 4 (kept) and at step 8 (recorded only as a hash).
The run ``unfinished`` was killed after step 6: its newest checkpoint is that of step 4, its ``delta`` and its
``metrics.jsonl`` are further. It has the configuration of ``spiel``, which was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
STEPS, SAVED, KILLED = 8, 4, 6
COMMON = (
    "name=frozen seed=3 train.steps=8 train.save_every=4 train.keep_last=null train.eval_every=2 "
    "train.batch_size=8 train.threads=1 train.device=cpu train.select=last optimizer.lr=0.02 "
    "optimizer.eps=1e-6"
)  # without the larger eps, gradients that are 0 but for rounding (of a key's bias) would move weights
IMAGES = "model=hf model.path=model model.name=tiny dataset=digits dataset.retention_images=8"
TEXTS = "model=hf model.path=gpt2 model.name=gpt2 dataset=csv dataset.path=texts.csv dataset.task=causal_lm"
SPIEL = "method=spiel method.sparsity=0.8 method.window=1 schedule.every=3 schedule.rate=0.5"
RUNS = {
    "full": "method=full",
    "head": "method=head train.select=best",
    "bitfit": "method=bitfit",
    "lora": "method=lora method.rank=2",
    "snell": "method=snell method.rank=4 method.sparsity=0.5 method.dropout=0.1 method.drop_path=0.1",
    "shira": "method=shira method.sparsity=0.8 train.select=best",
    "super_tuning": "method=super_tuning method.sparsity=0.8 method.branch=1",
    "lift": "method=lift method.sparsity=0.8 method.rank=2 schedule.every=3 optimizer.weight_decay=0.1",
    "off_principal": "method=off_principal method.sparsity=0.5 method.rank=2",
    "id3": "method=id3 method.sparsity=0.8",
    "lt_sft": "method=lt_sft method.sparsity=0.8 method.l1=0.1 schedule.dense=0.75",
    "lt_sft_second_phase": "method=lt_sft method.sparsity=0.8 method.l1=0.1 schedule.dense=0.25",
    "sparse": "method=sparse method.sparsity=0.8 method.score=snip method.scope=role method.grain=row "
    "schedule=drop_grow schedule.every=2 schedule.rate=0.5",
    "sparse_cubic": "method=sparse method.sparsity=0.8 method.score=magnitude method.scope=model "
    "schedule=cubic schedule.every=1 schedule.initial=3 schedule.end=0.75",
    "spiel": SPIEL,
    "sara": "method=sara method.sparsity=0.6 schedule.at=0.75 optimizer.weight_decay=0.01",
    "s2ft": "method=s2ft method.v=0.25 method.o=0.25 method.u=0.1 method.d=0.1",
    "spt": "method=spt method.sparsity=0.8 method.rank=1 method.alpha=2 method.batches=2",
    "snella": "method=snella method.rank=4 method.sparsity=0.5 method.every=2",
    "amt": "method=amt optimizer.lr=0.1",
    "hft": "method=hft method.rounds=3 method.norms=true",
    "peft": "method=peft method.type=LORA method.config.r=2",
    "sm3": "method=spiel method.sparsity=0.8 method.criterion=ma method.window=1 schedule.every=3 "
    "schedule.rate=0.5 optimizer=sm3 optimizer.lr=0.2",
    "ist": "method=lora method.rank=2 selector=ist selector.trained=0.5 selector.every=2",
    "language": "method=shira method.sparsity=0.8",
    "unfinished": SPIEL,
}
WORDS = "<pad> </s> <unk> the cat sat on a mat and another dog ran away from it".split()  # noqa: SIM905


def models(folder: Path) -> None:
    """Write both base models, with random weights, and the texts."""
    import numpy as np
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    torch.manual_seed(7)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "model")
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), use_cache=False, bos_token_id=1, eos_token_id=1, **sizes
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "gpt2")
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(WORDS[3:], 9)) for _ in range(40)]
    (folder / "texts.csv").write_text("text\n" + "\n".join(lines) + "\n", encoding="utf-8")


def train(name: str) -> None:
    """Train one run in the working directory; the unfinished one kills this process."""
    from finetune.config.load import load
    from finetune.training import run

    def progress(done: int, steps: int, words: str) -> None:
        if name == "unfinished" and done == KILLED:
            os._exit(9)

    given = " ".join((COMMON, TEXTS if name == "language" else IMAGES, RUNS[name], f"run={name}")).split()
    config = load(list({word.partition("=")[0]: word for word in given}.values()))  # the last word wins
    run.train(config, Path(name), lambda line: None, progress)


def digest(file: Path) -> str:
    """Hash the tensors of a safetensors file: SHA-256 over name, type, shape and bytes of each, by name."""
    from safetensors.torch import load_file

    total = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def machine() -> dict[str, str]:
    """Describe what decides the last bits: torch, the instructions that it uses, and the processor."""
    words: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            words[key.strip()] = value.strip()
    keys = ("model name", "cpu family", "model", "stepping")
    cpu = ", ".join(f"{key} {words[key]}" for key in keys if key in words)
    return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cpu": cpu}


def record(name: str) -> dict[str, Any]:
    """Say what a run in the working directory ended with; of the unfinished one, whose end it must reach."""
    from finetune.config.load import load

    folder = Path(name)
    found: dict[str, Any] = {"config_hash": load([], None, folder / "config.yaml").hash()}
    if name == "unfinished":
        return {**found, "ends_as": "spiel"}
    delta = (folder / "delta/delta.safetensors").read_bytes()
    result = json.loads((folder / "result.json").read_text())
    kept = {key: result[key] for key in ("metrics", "params", "steps", "best_step", "stored_bytes")}
    state = digest(folder / f"checkpoints/step-{STEPS}/state.safetensors")
    return {**found, "delta_sha256": hashlib.sha256(delta).hexdigest(), "final_state_sha256": state, **kept}


def keep(name: str, target: Path) -> None:
    """Copy what the tests read of a run; the name of this host is left out."""
    shutil.rmtree(target / name, ignore_errors=True)
    (target / name / "checkpoints").mkdir(parents=True)
    middle = f"checkpoints/step-{SAVED}"
    shutil.copytree(f"{name}/{middle}", target / name / middle)
    shutil.copytree(f"{name}/delta", target / name / "delta")
    for file in ("config.yaml", "metrics.jsonl", "predictions.parquet", "result.json"):
        if (Path(name) / file).is_file():
            shutil.copyfile(Path(name) / file, target / name / file)
    if name == "unfinished":
        log = (Path(name) / "log.txt").read_text(encoding="utf-8")
        (target / name / "log.txt").write_text(log.replace(socket.gethostname(), "host"), encoding="utf-8")


def main() -> None:
    """Make all runs in a temporary folder, and keep what the tests need."""
    target = HERE / "runs"
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        models(Path())
        for part in ("model", "gpt2"):
            shutil.copytree(part, target / part)
        shutil.copyfile("texts.csv", target / "texts.csv")
        for name in RUNS:
            if name == "unfinished":
                ended = subprocess.run([sys.executable, HERE / "make.py", name], check=False)
                assert ended.returncode == 9, ended
            else:
                train(name)
        recorded = {"commit": "0c0ceea", "machine": machine(), "runs": {name: record(name) for name in RUNS}}
        for name in RUNS:
            keep(name, target)
        (HERE / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
        os.chdir(HERE)


if __name__ == "__main__":
    HERE = HERE.resolve()
    train(sys.argv[1]) if sys.argv[1:] else main()
