"""Run a model forward and backward on micro-batches, for training steps and for requests of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core.collective import add_gradients, sum_processes
from ..core.loss import count, example_losses, scored
from ..core.objective import Need, Objective
from ..core.run import Run, Seen
from ..core.state import entry_stores
from ..data.encode import Batch
from .batches import Batches

T = TypeVar("T", float, Tensor)
NAMES: dict[Need, str] = {"hidden": "hidden_states", "attention": "attentions"}  # of transformers
MicroBatches = list[Batch | None]  # of one step; ``None`` if this process has no example left


def prepare_to_show(model: Any, needs: tuple[Need, ...]) -> None:
    """Make a transformers model able to show what is needed: fused attention has no attention weights."""
    if "attention" in needs:
        model.set_attn_implementation("eager")


def look(model: Any, needs: tuple[Need, ...], inputs: dict[str, Tensor]) -> Seen:
    """Run a transformers model forward; return its logits and what else is needed."""
    wanted = {f"output_{name}": True for name in (NAMES[need] for need in needs)}
    out = model(**inputs, **wanted)
    return Seen(out.logits, tuple(out.get("hidden_states") or ()), tuple(out.get("attentions") or ()))


class Tuned(nn.Module):
    """A model and the states of a phase as one module."""

    def __init__(self, model: nn.Module, states: nn.Module) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, needs: tuple[Need, ...] = (), **inputs: Tensor) -> Seen:
        """Return what the model gives for ``inputs``, with what is needed besides the logits."""
        return look(self.model, needs, inputs)


class Compute:
    """The forward and backward passes of one process.

    ``tuned`` and ``objective`` are those of the current phase, and ``run`` is what the objective sees.
    """

    tuned: Tuned
    run: Run
    objective: Objective

    def __init__(self, batches: Batches, accelerator: Accelerator) -> None:
        self.batches, self.accelerator = batches, accelerator

    def on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch's inputs to the model's device."""
        return {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}

    def count_scored(self, micro: MicroBatches) -> int:
        """Return how many examples (or tokens) of a step are scored, over all processes."""
        ours = sum(count(batch.labels) for batch in micro if batch)
        return int(sum_processes(torch.tensor(ours, device=self.accelerator.device)))

    def count_terms(self, micro: MicroBatches) -> dict[str, float]:
        """Return the count of each term of the objective in a step, over all processes."""
        totals: dict[str, float] = {}
        # every process has the terms of every stream, in one order, although it may have no example of one
        for stream in self.batches.used:
            for name in self.objective.counts(self.run, self.batches.stand_in(stream)):
                totals[name] = 0.0
        for batch in micro:
            if batch:
                for name, counted in self.objective.counts(self.run, batch).items():
                    totals[name] += counted
        summed = sum_processes(torch.tensor(list(totals.values()), dtype=torch.float64))
        return dict(zip(totals, summed.tolist(), strict=True))

    @contextmanager
    def evaluating(
        self, needs: tuple[Need, ...] = (), for_gradients: bool = False, in_training: bool = False
    ) -> Iterator[Callable[[Batch], Seen]]:
        """Yield a function from a batch to what the model gives, in eval mode.

        ``for_gradients``: use bfloat16 where training uses float16, whose gradients vanish without a loss
        scale. ``in_training``: in train mode instead.
        """
        training, device = self.tuned.training, self.accelerator.device.type
        avoid_fp16 = for_gradients and self.accelerator.scaler is not None

        def see(batch: Batch) -> Seen:
            with torch.autocast(device, torch.bfloat16) if avoid_fp16 else self.accelerator.autocast():
                found: Seen = self.tuned(needs, **self.on_device(batch.inputs))
            return found

        self.tuned.train(in_training)
        try:
            yield see
        finally:
            self.tuned.train(training)

    def mean_loss(self, micro: MicroBatches) -> Tensor:
        """Return the mean loss over a step's global batch, in eval mode."""
        total, weights = torch.zeros((), device=self.accelerator.device), self.objective.weights(self.run)
        for name, mean in self._mean_terms(micro).items():
            total = total + weights.get(name, 1.0) * mean
        return total

    def evaluate(self, micro: MicroBatches) -> tuple[float, dict[str, float]]:
        """Return the mean loss over a step's global batch, and the mean of each term without its weight.

        In eval mode and without gradient, as ``mean_loss``.
        """
        means = {name: float(mean) for name, mean in self._mean_terms(micro).items()}
        weights = self.objective.weights(self.run)
        return sum(weights.get(name, 1.0) * mean for name, mean in means.items()), means

    @torch.no_grad()
    def evaluate_added(self, micro: MicroBatches, added_loss: Callable[[Batch], Tensor | float]) -> float:
        """Return the penalty that ``backward`` adds to the loss of a step, over all processes."""
        total = 0.0
        for batch in micro:
            total += float(added_loss(batch or self._stand_in(micro)))
        share = total / (len(micro) * self.accelerator.num_processes)
        return float(sum_processes(torch.tensor(share, dtype=torch.float64)))

    @torch.no_grad()
    def _mean_terms(self, micro: MicroBatches) -> dict[str, Tensor]:
        """Return the mean of each term of the objective over a step's global batch, in eval mode."""
        counts = self.count_terms(micro)
        sums = self._start_sums(counts)
        with self.evaluating(self.objective.needs) as see:
            for batch in micro:
                if batch:
                    for name, term in self.objective.terms(self.run, see(batch), batch).items():
                        sums[name] += term
        return {name: _divide(sum_processes(term), counts[name]) for name, term in sums.items()}

    def scored_logits(self, batch: Batch) -> Tensor:
        """Return a batch's logits at the places that the loss is averaged over, in eval mode.

        [places, classes], see ``loss.scored``.
        """
        with self.evaluating() as see:
            return scored(see(batch).logits, batch.labels.to(self.accelerator.device))

    def probe(self, batch: Batch | None, micro: MicroBatches, summed: bool, in_training: bool) -> None:
        """Run one micro-batch backward, for parts that watch gradients.

        No parameter keeps a gradient. The loss is the micro-batch's share of the step's mean, or with
        ``summed`` that mean times the number of examples, or scored tokens, of the step. ``in_training``: in
        train mode instead of eval mode.
        """
        share, counts = batch or self._stand_in(micro), self.count_terms(micro)
        scale = float(self.count_scored(micro) if summed else self.accelerator.num_processes)
        with self.evaluating(self.objective.needs, True, in_training) as see:
            terms = self.objective.terms(self.run, see(share), share)
            loss = self._combine(terms, batch is not None, counts, scale)
            loss.backward()
        for parameter in self.tuned.states.parameters():
            parameter.grad = None

    @contextmanager
    def gradients(self, micro: MicroBatches) -> Iterator[float]:
        """Inside, every trained tensor has the gradient of the mean cross-entropy of a batch; yield the mean.

        Both are over all processes and in eval mode, whatever the objective is. Afterwards no tensor has a
        gradient. Entries of weights do not count these among the gradients of the step that they watch.
        """
        total, places = 0.0, max(1, self.count_scored(micro))
        stores = entry_stores(self.tuned.states)
        watches = [store.watch for store in stores]
        for store in stores:
            store.watch = None
        try:
            with self.evaluating(for_gradients=True) as see:
                for batch in micro:
                    share = batch or self._stand_in(micro)
                    logits = see(share).logits
                    losses = example_losses(logits, share.labels.to(logits.device))
                    loss = losses.sum() * (batch is not None) / places
                    loss.backward()
                    total += float(loss.detach())
            self.share_gradients()
            yield float(sum_processes(torch.tensor(total, dtype=torch.float64)))
        finally:
            for store, watch in zip(stores, watches, strict=True):
                store.watch = watch
            for parameter in self.tuned.states.parameters():
                parameter.grad = None

    def backward(
        self, micro: MicroBatches, added_loss: Callable[[Batch], Tensor | float]
    ) -> tuple[float, dict[str, float]]:
        """Compute this process's share of the gradients of the mean loss over the global batch.

        ``added_loss``: a penalty of the method, averaged over the micro-batches. Returns the mean loss
        without that penalty, and the mean of each term without its weight.
        """
        counts, weights = self.count_terms(micro), self.objective.weights(self.run)
        sums = self._start_sums(counts)
        for batch in micro:
            share = batch or self._stand_in(micro)
            with self.accelerator.autocast():
                seen = self.tuned(self.objective.needs, **self.on_device(share.inputs))
                terms = self.objective.terms(self.run, seen, share)
            loss = self._combine(terms, batch is not None, counts)
            added = added_loss(share) / (len(micro) * self.accelerator.num_processes)
            self.accelerator.backward(loss + added)
            if batch:
                for name, term in terms.items():
                    sums[name] += term.detach()
        means = {name: _divide(float(sum_processes(term)), counts[name]) for name, term in sums.items()}
        return sum(weights.get(name, 1.0) * mean for name, mean in means.items()), means

    def share_gradients(self) -> None:
        """Make every gradient the sum of all processes' gradients."""
        add_gradients(p for p in self.tuned.states.parameters() if p.requires_grad)

    def try_forward(self, batches: list[Batch]) -> None:
        """Run batches forward as training without gradients does, to see whether memory suffices."""
        self._mean_terms([*batches])

    def try_backward(self, batch: Batch) -> None:
        """Run a batch forward and backward as training does, to see whether memory suffices."""
        self.tuned.train()
        counts = self.objective.counts(self.run, batch)
        with self.accelerator.autocast():
            seen = self.tuned(self.objective.needs, **self.on_device(batch.inputs))
            terms = self.objective.terms(self.run, seen, batch)
        self.accelerator.backward(self._combine(terms, True, counts))

    def _start_sums(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: torch.zeros((), device=self.accelerator.device) for name in names}

    def _combine(
        self, terms: dict[str, Tensor], is_real: bool, counts: dict[str, float], scale: float = 1.0
    ) -> Tensor:
        """Return the loss of a micro-batch: its share of ``scale`` times the step's mean.

        ``is_real``: False for a stand-in, whose loss is 0.
        """
        weights, shares = self.objective.weights(self.run), []
        for name, term in terms.items():
            factor = _divide(weights.get(name, 1.0) * scale, counts[name])
            shares.append((term * is_real) * factor)
        total = shares[0]
        for share in shares[1:]:
            total = total + share
        return total

    def _stand_in(self, micro: MicroBatches) -> Batch:
        """Return a batch for a process without an example, which must run the model like the others."""
        for batch in micro:
            if batch:
                return batch
        return self.batches.stand_in()


def _divide(total: T, count: float) -> T:
    """Return the mean; 0 of nothing."""
    return total / count if count else total * 0
