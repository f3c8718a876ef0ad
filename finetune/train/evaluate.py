"""Metrics of a model on one split, and what it said about each example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ..data.encode import Batch, collate
from .loss import count, example_losses


@dataclass(frozen=True)
class Evaluation:
    """``metrics``: accuracy and loss, or bits_per_byte, perplexity and loss; ``rows``: one per example, in the split's order."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@torch.no_grad()
def evaluate(tuned: nn.Module, data: Any, batch_size: int, accelerator: Accelerator) -> Evaluation:
    """Every example once, in order; ``tuned(**inputs)`` gives logits."""
    was_training = tuned.training
    tuned.eval()
    rows: list[dict[str, Any]] = []
    counted = 0
    for batch in DataLoader(data, batch_size, collate_fn=collate, generator=torch.Generator()):
        with accelerator.autocast():
            logits = tuned(**{k: t.to(accelerator.device) for k, t in batch.inputs.items()})
        losses = example_losses(logits, batch.labels.to(accelerator.device)).cpu()
        rows += _rows(batch, logits.float().cpu(), losses.tolist())
        counted += count(batch)
    tuned.train(was_training)
    return Evaluation(_metrics(rows, counted), rows)


def _rows(batch: Batch, logits: torch.Tensor, losses: list[float]) -> list[dict[str, Any]]:
    if batch.bytes is not None:
        return [{"id": i, "loss": loss, "bytes": n} for i, loss, n in zip(batch.ids, losses, batch.bytes.tolist(), strict=True)]
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
