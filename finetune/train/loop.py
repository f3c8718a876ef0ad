"""The loop. It knows no method by name; see ``core/method.py`` for the order in which it calls them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core.bank import Bank
from ..core.collective import total
from ..core.inplace import InPlace, Source
from ..core.method import Method, Run
from ..core.part import Part, detach
from ..core.selector import Selector
from ..data.encode import Batch
from ..errors import ConfigError, RunFailed
from ..optim.adamw import AdamW
from ..optim.sm3 import SM3
from ..settings import OptimizerConfig, TrainConfig
from .batches import Batches
from .loss import count, example_losses, scored


class Tuned(nn.Module):
    """The model and the states of its methods as one module, so that data parallelism sees every trained tensor once. Returns logits."""

    def __init__(self, model: nn.Module, states: nn.Module) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        return logits


class NotFinite(RunFailed):
    """The loss became NaN or infinite; ``ids`` are the examples of that step."""

    def __init__(self, step: int, loss: float, ids: list[str]) -> None:
        super().__init__(f"The loss is {loss} at step {step}.")
        self.step, self.ids = step, ids


@dataclass(frozen=True)
class Step:
    """One finished optimizer step; ``number`` counts from 1 over the whole run."""

    number: int
    loss: float
    lr: float
    seconds: float
    metrics: dict[str, float]


def rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """The share of ``lr`` at ``step`` (from 0): linear warm-up, then cosine or linear to zero, or constant."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if settings.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    return 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(states: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Over the trained tensors. Vectors (biases, norms) and some parts do not decay; a bank's values do: towards the pretrained weight."""
    banks = [m for m in states.modules() if isinstance(m, Bank)]
    banked = {id(bank.values) for bank in banks}
    trained = [p for p in states.parameters() if p.requires_grad]
    spared = {id(p) for m in states.modules() if isinstance(m, Part) and not m.decays for p in m.parameters()}
    decays = [p for p in trained if (p.ndim > 1 or id(p) in banked) and id(p) not in spared]
    rest = [p for p in trained if all(p is not d for d in decays)]
    groups = [{"params": decays, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if settings.name == "sm3":
        return SM3(groups, settings.lr, settings.eps, banks)
    return AdamW(groups, [bank.values for bank in banks if bank.ages], lr=settings.lr, betas=settings.betas, eps=settings.eps)


class Session:
    """One method being trained on one model. ``steps()`` runs it; ``state_dict`` at any yield is enough to go on to the bit."""

    def __init__(
        self, model: nn.Module, method: Method, head: tuple[str, ...], batches: Batches, optimizer: OptimizerConfig, train: TrainConfig, seed: int,
        accelerator: Accelerator, source: Source | None = None, selector: Selector | None = None,
    ) -> None:  # fmt: skip
        self.selector = selector or Selector()
        self.model, self.method, self.head, self.batches = model.requires_grad_(False), method, list(head), batches
        self.optimizer_settings, self.train, self.seed, self.accelerator, self.source = optimizer, train, seed, accelerator, source
        phases = method.phases()
        ends = [round(train.steps * sum(p.share for p in phases[: i + 1])) for i in range(len(phases))]
        self.phases = list(zip([p.method for p in phases], [0, *ends], ends))  # noqa: B905  (the starts are one longer)
        self.number = 0  # optimizer steps done
        self.phase = -1
        self.states = nn.ModuleDict()
        self._enter(0)

    @property
    def stage(self) -> list[int]:
        """The phase, and whether its method has reached what was asked for."""
        return [self.phase, int(self.current.ready(self.run.step, self.run.total))]

    def enter(self, phase: int) -> None:
        """Stand at the beginning of a phase, with the earlier one's parts taken away."""
        if phase != self.phase:
            detach(self.model, self.states)
            self._enter(phase)

    def _enter(self, phase: int) -> None:
        """Build the phase's states and the optimizer over them."""
        self.phase, self.begun = phase, False
        self.current, start, end = self.phases[phase]
        torch.manual_seed(self.seed + phase)
        states = nn.ModuleDict()
        if self.head:
            states["head"] = InPlace(self.model, self.head, keep=True)
        states["method"] = self.current.build(self.model)
        self.states = states
        for part in states.modules():
            if isinstance(part, InPlace):
                part.source = self.source
        if not any(p.requires_grad for p in states.parameters()):
            raise ConfigError(
                f"method={self.current.name} has nothing to train here: a language model has no new head. Choose another method, for example lora."
            )
        states["selector"] = self.selector.build(self.model, states) or nn.Module()
        self.accelerator.free_memory()
        self.tuned = self.accelerator.prepare_model(Tuned(self.model, states))
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(states, self.optimizer_settings))
        generator = torch.Generator().manual_seed(self.seed + phase)
        given = (self._mean_loss, self._upcoming, self._probe, self._logits)
        self.run = Run(self.model, states, self.optimizer, end - start, generator, *given, self.number - start)

    @contextmanager
    def _evaluating(self) -> Iterator[Callable[[Batch], Tensor]]:
        """Logits of a batch in eval mode, of the unwrapped model: no process waits for another."""
        tuned, training = self.accelerator.unwrap_model(self.tuned), self.tuned.training

        def logits(batch: Batch) -> Tensor:
            with self.accelerator.autocast():
                found: Tensor = tuned(**self.on_device(batch.inputs))
            return found

        tuned.eval()
        try:
            yield logits
        finally:
            tuned.train(training)

    def _losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss summed over a batch."""
        return example_losses(logits, batch.labels.to(self.accelerator.device)).sum()

    def _counted(self, micro: list[Batch | None]) -> int:
        """Scored examples or tokens of a step, over all processes."""
        return int(total(torch.tensor(sum(count(b) for b in micro if b), device=self.accelerator.device)))

    @torch.no_grad()
    def _mean_loss(self, micro: list[Batch | None]) -> Tensor:
        """The mean loss over a step's global batch, in eval mode."""
        loss_sum = torch.zeros((), device=self.accelerator.device)
        with self._evaluating() as logits:
            for batch in filter(None, micro):
                loss_sum += self._losses(logits(batch), batch)
        return total(loss_sum) / self._counted(micro)

    def _upcoming(self, steps: int) -> list[list[Batch | None]]:
        return list(self.batches.steps(self.number, self.number + steps))

    def _probe(self, batch: Batch | None, micro: list[Batch | None], summed: bool) -> None:
        """Backward of one micro-batch in eval mode, of its share of the step's mean loss or (``summed``) of the sum over its examples."""
        share = batch or next(b for b in micro if b)
        with self._evaluating() as logits:
            loss = self._losses(logits(share), share) * (batch is not None)
            (loss if summed else loss * (self.accelerator.num_processes / self._counted(micro))).backward()
        for parameter in self.states.parameters():
            parameter.grad = None

    def _logits(self, batch: Batch) -> Tensor:
        with self._evaluating() as logits:
            return scored(logits(batch), batch.labels.to(self.accelerator.device))

    def on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch's inputs where the model is."""
        return {name: t.to(self.accelerator.device) for name, t in inputs.items()}

    def start(self, previous: nn.Module | None = None) -> None:
        """Let the phase's method set its values; once a phase, not on resume."""
        self.begun = True
        self.current.begin(self.run, self.states["method"], previous)

    def steps(self) -> Iterator[Step]:
        """Train from where the session stands to the end, yielding after every optimizer step."""
        for phase in range(self.phase, len(self.phases)):
            if phase != self.phase:
                previous = self.states["method"]
                self.enter(phase)
                self.start(previous)
            elif not self.begun:
                self.start()
            _, start, end = self.phases[phase]
            for micro in self.batches.steps(self.number, end):
                self.run.step = self.number - start
                yield self._step(micro)

    def _step(self, micro: list[Batch | None]) -> Step:
        began = time.perf_counter()
        self.tuned.train()
        state, run = self.states["method"], self.run
        run.batch, run.metrics = micro, {}
        lr = self.optimizer_settings.lr * rate(self.optimizer_settings, self.number, self.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.current.before_step(run, state)
        self.selector.before_step(run, self.states["selector"])
        loss = self._backward(micro)
        self.current.after_backward(run, state)
        if self.train.clip:
            self.accelerator.clip_grad_norm_([p for p in self.states.parameters() if p.requires_grad], self.train.clip)
        self.optimizer.step()
        self.current.after_step(run, state)
        self.selector.after_step(run, self.states["selector"])
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return Step(self.number, loss, lr, time.perf_counter() - began, run.metrics)

    def _backward(self, micro: list[Batch | None]) -> float:
        """Gradients of the mean loss over the global batch, summed up from micro-batches. Returns that mean."""
        device, world = self.accelerator.device, self.accelerator.num_processes
        counted, loss_sum = self._counted(micro), torch.zeros((), device=device)
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            share = batch or next(b for b in micro if b)
            with self._syncing(last):
                with self.accelerator.autocast():
                    logits = self.tuned(**self.on_device(share.inputs))
                task = self._losses(logits, share) * (batch is not None)
                added = self.current.loss(self.run, self.states["method"], share)
                # data parallelism averages over processes, hence ``world``; the added term counts once a step
                self.accelerator.backward(task * (world / counted) + added / len(micro))
            loss_sum += task.detach()
        loss = float(total(loss_sum)) / counted
        if not math.isfinite(loss):
            raise NotFinite(self.number + 1, loss, [i for b in micro if b for i in b.ids])
        return loss

    def _syncing(self, last: bool) -> Any:
        """Gradients are exchanged with the last micro-batch only."""
        return torch.enable_grad() if last else self.accelerator.no_sync(self.tuned)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        rng = {"torch": torch.get_rng_state(), "method": self.run.generator.get_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        states, optimizer = self.states.state_dict(), self.optimizer.state_dict()
        return {"phase": self.phase, "number": self.number, "states": states, "optimizer": optimizer, "scaler": scaler, "rng": rng}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from ``saved``. Raises ``RuntimeError`` where it belongs to another method or model."""
        self.number = saved["number"]
        self.enter(saved["phase"])
        self.begun = True
        self.states.load_state_dict(saved["states"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.run.generator.set_state(saved["rng"]["method"])
        torch.set_rng_state(saved["rng"]["torch"])
        if "cuda" in saved["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
