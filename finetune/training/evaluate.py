"""Evaluate a model on one split: its metrics, and its answer to each example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core.collective import gather
from ..core.loss import count, example_losses
from ..data.encode import Batch, collate
from ..errors import RunFailed
from .memory import ADVICE, ran_out, release_memory

LARGEST_EXPONENT = 700.0  # beyond it, exp would overflow float64


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a split, and one row per example in the split's order.

    ``metrics``: accuracy (share) and loss (nats per example); or bits_per_byte, perplexity and loss (nats per
    token).
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@torch.no_grad()
def evaluate(tuned: nn.Module, data: Any, batch_size: int, accelerator: Accelerator) -> Evaluation:
    """Evaluate every example once, in order. The model's answers are ``tuned(**inputs).logits``.

    The batches are dealt out to the processes in turn, and every process gets all results. A batch that does
    not fit into memory is halved. Raises ``RunFailed`` if a single example does not fit.
    """
    was_training, world = tuned.training, accelerator.num_processes
    tuned.eval()
    places = []
    for start in range(0, len(data), batch_size):
        places.append(list(range(start, min(start + batch_size, len(data)))))
    loader = DataLoader(
        data,
        batch_sampler=places[accelerator.process_index :: world],
        collate_fn=collate,
        generator=torch.Generator(),
    )
    ours = [(_evaluate_batch(tuned, batch, accelerator), count(batch.labels)) for batch in loader]
    tuned.train(was_training)
    by_process = gather(ours)
    rows, scored = [], 0
    for i in range(len(places)):
        found, counted = by_process[i % world][i // world]
        rows += found
        scored += counted
    return Evaluation(_metrics(rows, scored), rows)


def _evaluate_batch(tuned: nn.Module, batch: Batch, accelerator: Accelerator) -> list[dict[str, Any]]:
    try:
        inputs = {name: tensor.to(accelerator.device) for name, tensor in batch.inputs.items()}
        with accelerator.autocast():
            logits = tuned(**inputs).logits
        losses = example_losses(logits, batch.labels.to(accelerator.device)).cpu()
        return _rows(batch, logits.float().cpu(), losses.tolist())
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    release_memory(tuned)  # outside the except clause: the error keeps every tensor of its stack alive
    half = len(batch.ids) // 2
    if half == 0:
        raise RunFailed(f"Memory ran out in the evaluation of a single example. {ADVICE}")
    rows = _evaluate_batch(tuned, _part(batch, slice(half)), accelerator)
    return rows + _evaluate_batch(tuned, _part(batch, slice(half, None)), accelerator)


def _part(batch: Batch, part: slice) -> Batch:
    inputs = {name: tensor[part] for name, tensor in batch.inputs.items()}
    sizes = None if batch.bytes is None else batch.bytes[part]
    return Batch(batch.ids[part], inputs, batch.labels[part], sizes)


def _rows(batch: Batch, logits: Tensor, losses: list[float]) -> list[dict[str, Any]]:
    """Return one row per example.

    Columns: id, loss, bytes for a language model; id, label, prediction, score, loss for a classifier.
    """
    rows: list[dict[str, Any]] = []
    if batch.bytes is not None:
        for i, loss, size in zip(batch.ids, losses, batch.bytes.tolist(), strict=True):
            rows.append({"id": i, "loss": loss, "bytes": size})
        return rows
    scores, predictions = logits.softmax(-1).max(-1)
    columns = (batch.ids, batch.labels.tolist(), predictions.tolist(), scores.tolist(), losses)
    for i, label, prediction, score, loss in zip(*columns, strict=True):
        rows.append({"id": i, "label": label, "prediction": prediction, "score": score, "loss": loss})
    return rows


def _metrics(rows: list[dict[str, Any]], scored: int) -> dict[str, float]:
    loss = math.fsum(row["loss"] for row in rows) / scored
    if "bytes" in rows[0]:
        bits = loss * scored / math.log(2) / sum(row["bytes"] for row in rows)
        perplexity = math.exp(min(loss, LARGEST_EXPONENT))
        return {"bits_per_byte": bits, "perplexity": perplexity, "loss": loss}
    correct = sum(row["label"] == row["prediction"] for row in rows)
    return {"accuracy": correct / len(rows), "loss": loss}


def sort_key(metrics: dict[str, float]) -> tuple[float, float]:
    """Return a key that grows with quality: accuracy or negative bits per byte, then the negative loss."""
    return metrics.get("accuracy", -metrics.get("bits_per_byte", 0.0)), -metrics["loss"]
