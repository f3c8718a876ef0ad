"""Measure what pruning costs a language model, in bits per byte: the table of docs/guides/prune.md.

python scripts/pruning.py                                    builtin:tiny_lm on the standard library
python scripts/pruning.py --model FOLDER dataset=jsonl dataset.path=...
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.artifacts.pass_subject import Request
from finetune.artifacts.passes import run
from finetune.config.load import load as load_config
from finetune.config.settings import ModelConfig, TrainConfig
from finetune.core.pruning import Pruning
from finetune.data.encode import encode
from finetune.models.load import load
from finetune.passes.magnitude import Magnitude
from finetune.passes.wanda import Wanda
from finetune.training.evaluate import evaluate
from finetune.training.prepare import make_accelerator

METHODS: dict[str, list[Pruning]] = {
    "magnitude": [Magnitude(sparsity=0.5), Magnitude(sparsity=0.6), Magnitude(pattern="2:4")],
    "magnitude, scope=row": [Magnitude(sparsity=0.5, scope="row"), Magnitude(sparsity=0.6, scope="row")],
    "wanda": [Wanda(sparsity=0.5), Wanda(sparsity=0.6), Wanda(pattern="2:4")],
    "wanda, inputs=original": [
        Wanda(sparsity=0.5, inputs="original"),
        Wanda(sparsity=0.6, inputs="original"),
    ],
}
COLUMNS = ("0.5", "0.6", "2:4")


def measure(model: str, words: list[str], calibration: int) -> None:
    """Print the bits per byte of the dense model, and those of each way of pruning, on the test split."""
    dataset = load_config(words).dataset
    raw = dataset.read()

    def bits(path: str) -> float:
        base = load(ModelConfig("hf", path), raw.task, raw.labels, 0)
        test = encode(raw, base.processor)["test"]
        return evaluate(base.model, test, 32, make_accelerator(TrainConfig(device="cpu"))).metrics[
            "bits_per_byte"
        ]

    print(f"dense: {bits(model):.3f}")
    print(f"| method | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        for number, (label, methods) in enumerate(METHODS.items()):
            found: dict[str, str] = {}
            for method in methods:
                column = method.pattern or str(method.sparsity)
                out = Path(folder) / f"{number}-{column.replace(':', '-')}"
                data = dataset if method.needs else None
                run(Request(method, model, out, data, calibration))
                found[column] = f"{bits(str(out)):.3f}"
            cells = [found.get(column, "-") for column in COLUMNS]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:tiny_lm", help="a folder, a hub id or builtin:NAME")
    parser.add_argument("--calibration", type=int, default=128, help="examples that Wanda calibrates on")
    parser.add_argument("words", nargs="*", default=["dataset=stdlib"], help="the data set, as for train")
    given = parser.parse_args()
    measure(given.model, given.words or ["dataset=stdlib"], given.calibration)
