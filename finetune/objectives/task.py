"""The task's own loss: cross-entropy over the examples, or over the scored tokens of a language model.

Formula:
    loss = sum(w_y l) / sum(w_y),  l = (1 - s) (-log p_y) + s mean_c(-w_c log p_c) / w_y
    p: softmax of the logits; y: the label; w: class weights, all 1 by default; s: label smoothing

This is the weighted and smoothed mean of ``torch.nn.functional.cross_entropy``. Metrics and the loss of an
evaluation remain those of the plain cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from ..core.loss import count, example_losses, scored, scored_labels
from ..core.objective import Objective
from ..core.run import Run, Seen
from ..errors import ConfigError
from ..registry import register


@register("task")
@dataclass(frozen=True)
class Task(Objective):
    """The task's own loss: cross-entropy, with label smoothing and class weights.

    Options:
        label_smoothing: Share of the target that is spread evenly over all classes, or all tokens.
        class_weights: Weight of the examples of each class, in the order of the labels. ``balanced``: weights
            n / (classes * n_c), where n_c of the n training examples are of class c. ``null``: all are 1.
    """

    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    class_weights: Literal["balanced"] | tuple[Annotated[float, Ge(0)], ...] | None = None

    def check(self, run: Run) -> None:
        counts, given = run.class_counts(), self.class_weights
        if given is None:
            return
        if counts is None:
            raise ConfigError(
                f"objective.class_weights={_show(given)} has no effect on a language model, which has no "
                "classes; leave it out."
            )
        if given != "balanced" and not any(given):
            raise ConfigError(
                f"objective.class_weights={_show(given)} are all 0, so nothing is minimized; raise one."
            )
        if given == "balanced":
            if empty := [str(i) for i, n in enumerate(counts) if not n]:
                raise ConfigError(
                    "objective.class_weights=balanced needs training examples of every class; there are none "
                    f"of class {', '.join(empty)}. List the weights instead."
                )
        elif len(given) != len(counts):
            raise ConfigError(
                f"objective.class_weights={_show(given)} has {len(given)} weights, but the data set has "
                f"{len(counts)} classes; give one for each."
            )

    def counts(self, run: Run, batch: Any) -> dict[str, float]:
        weights = self.weigh_classes(run)
        if weights is None:
            return {"task": count(batch.labels)}
        return {"task": float(weights[batch.labels].sum(dtype=torch.float64))}

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        labels, weights = batch.labels.to(seen.logits.device), self.weigh_classes(run)
        if not self.label_smoothing and weights is None:
            return {"task": example_losses(seen.logits, labels).sum()}
        loss = F.cross_entropy(
            scored(seen.logits, labels),
            scored_labels(labels),
            weight=None if weights is None else weights.to(labels.device),
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return {"task": loss}

    def weigh_classes(self, run: Run) -> Tensor | None:
        """Return the weight of each class, float32 [classes]; None if all are 1."""
        if self.class_weights is None:
            return None
        if self.class_weights != "balanced":
            return torch.tensor(self.class_weights)
        counts = torch.tensor(run.class_counts() or [], dtype=torch.float64)
        return (counts.sum() / (len(counts) * counts)).float()


def _show(weights: str | tuple[float, ...]) -> str:
    return weights if isinstance(weights, str) else f"[{','.join(f'{w:g}' for w in weights)}]"
