"""Run a model forward and backward on micro-batches, for training steps and for requests of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core.collective import add_gradients, sum_processes
from ..data.encode import Batch
from .batches import Batches
from .loss import count, example_losses, scored

MicroBatches = list[Batch | None]  # of one step; ``None`` if this process has no example left


class Tuned(nn.Module):
    """A model and the states of a phase as one module, which returns logits."""

    def __init__(self, model: nn.Module, states: nn.Module) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        return logits


class Compute:
    """The forward and backward passes of one process. ``tuned`` is the model of the current phase."""

    tuned: Tuned

    def __init__(self, batches: Batches, accelerator: Accelerator) -> None:
        self.batches, self.accelerator = batches, accelerator

    def on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch's inputs to the model's device."""
        return {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}

    def sum_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss summed over the examples of a batch."""
        return example_losses(logits, batch.labels.to(self.accelerator.device)).sum()

    def count_scored(self, micro: MicroBatches) -> int:
        """Return how many examples (or tokens) of a step are scored, over all processes."""
        ours = sum(count(batch) for batch in micro if batch)
        return int(sum_processes(torch.tensor(ours, device=self.accelerator.device)))

    @contextmanager
    def evaluating(self, for_gradients: bool = False) -> Iterator[Callable[[Batch], Tensor]]:
        """Yield a function from a batch to logits, in eval mode.

        ``for_gradients``: use bfloat16 where training uses float16, whose gradients vanish without a loss
        scale.
        """
        training, device = self.tuned.training, self.accelerator.device.type
        avoid_fp16 = for_gradients and self.accelerator.scaler is not None

        def logits(batch: Batch) -> Tensor:
            with torch.autocast(device, torch.bfloat16) if avoid_fp16 else self.accelerator.autocast():
                found: Tensor = self.tuned(**self.on_device(batch.inputs))
            return found

        self.tuned.eval()
        try:
            yield logits
        finally:
            self.tuned.train(training)

    @torch.no_grad()
    def mean_loss(self, micro: MicroBatches) -> Tensor:
        """Return the mean loss over a step's global batch, in eval mode."""
        loss_sum = torch.zeros((), device=self.accelerator.device)
        with self.evaluating() as logits:
            for batch in micro:
                if batch:
                    loss_sum += self.sum_losses(logits(batch), batch)
        return sum_processes(loss_sum) / self.count_scored(micro)

    def scored_logits(self, batch: Batch) -> Tensor:
        """Return a batch's logits at the places that the loss is averaged over, in eval mode.

        [places, classes], see ``loss.scored``.
        """
        with self.evaluating() as logits:
            return scored(logits(batch), batch.labels.to(self.accelerator.device))

    def probe(self, batch: Batch | None, micro: MicroBatches, summed: bool) -> None:
        """Run one micro-batch backward in eval mode, for parts that watch gradients.

        No parameter keeps a gradient. The loss is the micro-batch's share of the step's mean, or with
        ``summed`` the sum over its examples.
        """
        share = batch or self._stand_in(micro)
        with self.evaluating(for_gradients=True) as logits:
            loss = self.sum_losses(logits(share), share) * (batch is not None)
            if not summed:
                loss = loss * (self.accelerator.num_processes / self.count_scored(micro))
            loss.backward()
        for parameter in self.tuned.states.parameters():
            parameter.grad = None

    def backward(self, micro: MicroBatches, added_loss: Callable[[Batch], Tensor | float]) -> float:
        """Compute this process's share of the gradients of the mean loss over the global batch.

        ``added_loss``: a further term, averaged over the micro-batches. Returns the mean loss without that
        term.
        """
        counted, loss_sum = self.count_scored(micro), torch.zeros((), device=self.accelerator.device)
        for batch in micro:
            share = batch or self._stand_in(micro)
            with self.accelerator.autocast():
                logits = self.tuned(**self.on_device(share.inputs))
            task = self.sum_losses(logits, share) * (batch is not None)
            added = added_loss(share) / (len(micro) * self.accelerator.num_processes)
            self.accelerator.backward(task * (1 / counted) + added)
            loss_sum += task.detach()
        return float(sum_processes(loss_sum)) / counted

    def share_gradients(self) -> None:
        """Make every gradient the sum of all processes' gradients."""
        add_gradients(p for p in self.tuned.states.parameters() if p.requires_grad)

    def try_backward(self, batch: Batch) -> None:
        """Run a batch forward and backward as training does, to see whether memory suffices."""
        self.tuned.train()
        with self.accelerator.autocast():
            logits = self.tuned(**self.on_device(batch.inputs))
        self.accelerator.backward(self.sum_losses(logits, batch))

    def _stand_in(self, micro: MicroBatches) -> Batch:
        """Return a batch for a process without an example, which must run the model like the others."""
        for batch in micro:
            if batch:
                return batch
        return self.batches.stand_in()
