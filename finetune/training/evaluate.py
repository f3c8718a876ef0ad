"""Metrics of a model on one split, and what it said about each example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ..core.collective import gather
from ..data.encode import Batch, collate
from ..errors import RunFailed
from .loss import count, example_losses
from .memory import ADVICE, put_back, ran_out


@dataclass(frozen=True)
class Evaluation:
    """``metrics``: accuracy and loss, or bits_per_byte, perplexity and loss; ``rows``: one per example, in the split's order."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@torch.no_grad()
def evaluate(tuned: nn.Module, data: Any, batch_size: int, accelerator: Accelerator) -> Evaluation:
    """Every example once, in order; ``tuned(**inputs)`` gives logits. The processes take turns at the batches, and all get all the numbers."""
    was_training, world = tuned.training, accelerator.num_processes
    tuned.eval()
    parts = [
        list(range(start, min(start + batch_size, len(data)))) for start in range(0, len(data), batch_size)
    ]
    loader = DataLoader(
        data,
        batch_sampler=parts[accelerator.process_index :: world],
        collate_fn=collate,
        generator=torch.Generator(),
    )
    mine = [(_judged(tuned, batch, accelerator), count(batch)) for batch in loader]
    tuned.train(was_training)
    every = gather(mine)
    found = [every[i % world][i // world] for i in range(len(parts))]
    rows = [row for judged, _ in found for row in judged]
    return Evaluation(_metrics(rows, sum(counted for _, counted in found)), rows)


def _judged(tuned: nn.Module, batch: Batch, accelerator: Accelerator) -> list[dict[str, Any]]:
    """The rows of a batch, in two halves where memory is too short for the whole."""
    try:
        with accelerator.autocast():
            logits = tuned(**{k: t.to(accelerator.device) for k, t in batch.inputs.items()})
        losses = example_losses(logits, batch.labels.to(accelerator.device)).cpu()
        return _rows(batch, logits.float().cpu(), losses.tolist())
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    put_back(tuned)
    half = len(batch.ids) // 2
    if not half:
        raise RunFailed(f"Memory ran out in the evaluation of a single example. {ADVICE}")
    return [
        row
        for part in (slice(half), slice(half, None))
        for row in _judged(tuned, _part(batch, part), accelerator)
    ]


def _part(batch: Batch, part: slice) -> Batch:
    inputs = {name: t[part] for name, t in batch.inputs.items()}
    return Batch(
        batch.ids[part], inputs, batch.labels[part], None if batch.bytes is None else batch.bytes[part]
    )


def _rows(batch: Batch, logits: torch.Tensor, losses: list[float]) -> list[dict[str, Any]]:
    if batch.bytes is not None:
        return [
            {"id": i, "loss": loss, "bytes": n}
            for i, loss, n in zip(batch.ids, losses, batch.bytes.tolist(), strict=True)
        ]
    score, prediction = logits.softmax(-1).max(-1)
    columns = zip(batch.ids, batch.labels.tolist(), prediction.tolist(), score.tolist(), losses, strict=True)
    return [{"id": i, "label": y, "prediction": p, "score": s, "loss": loss} for i, y, p, s, loss in columns]


def _metrics(rows: list[dict[str, Any]], counted: int) -> dict[str, float]:
    loss = math.fsum(r["loss"] for r in rows) / counted
    if "bytes" in rows[0]:
        bits = loss * counted / math.log(2) / sum(r["bytes"] for r in rows)
        return {"bits_per_byte": bits, "perplexity": math.exp(min(loss, 700.0)), "loss": loss}
    return {"accuracy": sum(r["label"] == r["prediction"] for r in rows) / len(rows), "loss": loss}


def better(metrics: dict[str, float]) -> tuple[float, float]:
    """A key that grows with quality: accuracy and then loss, or bits per byte."""
    return (metrics.get("accuracy", -metrics.get("bits_per_byte", 0.0)), -metrics["loss"])
