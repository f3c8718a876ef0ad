"""The loop. It knows no method by name; see ``core/method.py`` for the order in which it calls them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.settings import TrainConfig
from ..core.collective import add_gradients, share_, total
from ..core.inplace import InPlace
from ..core.method import Method, Run
from ..core.optimizer import Optimizer
from ..core.part import Source, detach, parts
from ..core.selector import Selector
from ..data.encode import Batch
from ..errors import ConfigError, RunFailed
from ..system import random_state as rng
from .batches import Batches
from .loss import count, example_losses, scored
from .memory import ADVICE, Memory, draws, ran_out, redraw
from .optimizer import make_optimizer, rate

SCALES = 40  # how often fp16 may lower its loss scale in one step


class Tuned(nn.Module):
    """The model and the states of its methods as one module. Returns logits."""

    def __init__(self, model: nn.Module, states: nn.Module) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        return logits


class NotFinite(RunFailed):
    """The loss (or ``what``) became NaN or infinite; ``ids`` are the examples of that step."""

    def __init__(self, step: int, value: float, ids: list[str], what: str = "loss") -> None:
        super().__init__(f"The {what} is {value} at step {step}.")
        self.step, self.ids = step, ids


@dataclass(frozen=True)
class Step:
    """One finished optimizer step; ``number`` counts from 1 over the whole run."""

    number: int
    loss: float
    lr: float
    seconds: float
    metrics: dict[str, float]


class Session:
    """One method being trained on one model. ``steps()`` runs it; ``state_dict`` at any yield is enough to go on to the bit."""

    def __init__(
        self, model: nn.Module, method: Method, head: tuple[str, ...], batches: Batches, optimizer: Optimizer, train: TrainConfig, seed: int,
        accelerator: Accelerator, source: Source | None = None, selector: Selector | None = None,
    ) -> None:  # fmt: skip
        self.selector = selector or Selector()
        self.model, self.method, self.head, self.batches = (
            model.requires_grad_(False),
            method,
            list(head),
            batches,
        )
        self.optimizer_settings, self.train, self.seed, self.accelerator, self.source = (
            optimizer,
            train,
            seed,
            accelerator,
            source,
        )
        phases = method.phases()
        ends = [round(train.steps * sum(p.share for p in phases[: i + 1])) for i in range(len(phases))]
        self.phases = list(zip([p.method for p in phases], [0, *ends], ends))  # noqa: B905  (the starts are one longer)
        self.number = 0  # optimizer steps done
        self.phase = -1
        self.states = nn.ModuleDict()
        self.memory = Memory(self)
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

    def rebuild(self) -> None:
        """Stand at the beginning of this phase, as if nothing had been done in it."""
        detach(self.model, self.states)
        self._enter(self.phase)

    def _enter(self, phase: int) -> None:
        """Build the phase's states and the optimizer over them."""
        self.phase, self.begun = phase, False
        self.current, start, end = self.phases[phase]
        rng.seed(self.seed + phase)
        states = nn.ModuleDict()
        if self.head:
            states["head"] = InPlace(self.model, self.head, keep=True)
        states["method"] = self.current.build(self.model)
        self.states = states
        for part in parts(states):
            part.use_source(self.source)
        if not any(p.requires_grad for p in states.parameters()):
            raise ConfigError(
                f"method={self.current.name} has nothing to train here: a language model has no new head. Choose another method, for example lora."
            )
        states["selector"] = self.selector.build(self.model, states) or nn.Module()
        self.accelerator.free_memory()
        self.tuned = Tuned(self.model, states).to(self.accelerator.device)
        share_(states.state_dict().values())
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(states, self.optimizer_settings))
        generator = torch.Generator().manual_seed(self.seed + phase)
        given = (self._mean_loss, self._upcoming, self._probe, self._logits)
        self.run = Run(
            self.model, states, self.optimizer, end - start, generator, *given, self.number - start
        )

    @contextmanager
    def _evaluating(self, probing: bool = False) -> Iterator[Callable[[Batch], Tensor]]:
        """Logits of a batch in eval mode. ``probing``: their gradients are wanted, which without a loss scale would vanish in fp16."""
        training, device = self.tuned.training, self.accelerator.device.type
        wide = probing and self.accelerator.scaler is not None

        def logits(batch: Batch) -> Tensor:
            with torch.autocast(device, torch.bfloat16) if wide else self.accelerator.autocast():
                found: Tensor = self.tuned(**self.on_device(batch.inputs))
            return found

        self.tuned.eval()
        try:
            yield logits
        finally:
            self.tuned.train(training)

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

    def _stand_in(self, micro: list[Batch | None]) -> Batch:
        """What a process without an example does the same work on as the others, for nothing."""
        return next(filter(None, micro), None) or self.batches.stand_in()

    def _upcoming(self, steps: int) -> list[list[Batch | None]]:
        return list(self.batches.steps(self.number, self.number + steps))

    def _probe(self, batch: Batch | None, micro: list[Batch | None], summed: bool) -> None:
        """Backward of one micro-batch in eval mode, of its share of the step's mean loss or (``summed``) of the sum over its examples."""
        share = batch or self._stand_in(micro)
        with self._evaluating(probing=True) as logits:
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
        self.memory.enough(lambda: self.current.begin(self.run, self.states["method"], previous))

    def steps(self) -> Generator[Step, None, None]:
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
        state, run, enough = self.states["method"], self.run, self.memory.enough
        run.batch, run.metrics = micro, {}
        if (
            self.accelerator.num_processes > 1
        ):  # each draws numbers of its own, and what a checkpoint says of them serves all
            torch.manual_seed(hash((self.seed, self.number, self.accelerator.process_index)) % 2**63)
        lr = self.optimizer_settings.lr * rate(self.optimizer_settings, self.number, self.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        enough(lambda: self.current.before_step(run, state))
        enough(lambda: self.selector.before_step(run, self.states["selector"]))
        loss = self._update()
        self.current.after_step(run, state)
        self.selector.after_step(run, self.states["selector"])
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return Step(self.number, loss, lr, time.perf_counter() - began, run.metrics)

    def _update(self) -> float:
        """Move the trained values once. Where gradients of fp16 overflow, all is done again at half the loss scale: no schedule has seen it."""
        start, scaler = draws(self), self.accelerator.scaler
        for _ in range(SCALES):
            loss, scale = (
                self.memory.enough(self._gradients, self._again),
                scaler.get_scale() if scaler else 0.0,
            )
            self.run.log(grad_norm=self._clip())
            try:
                self.optimizer.step()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                raise RunFailed(
                    f"Memory ran out in the optimizer, at step {self.number + 1}. {ADVICE}"
                ) from None
            if (
                not scaler or scaler.get_scale() >= scale
            ):  # not ``step_was_skipped``: fused optimizers leave a step out by themselves
                return loss
            self.optimizer.zero_grad(set_to_none=True)
            redraw(self, start)
            self._again()
        raise NotFinite(
            self.number + 1,
            math.inf,
            [i for b in self.run.batch if b for i in b.ids],
            "gradient at every loss scale",
        )

    def _clip(self) -> float:
        """The norm of all gradients together, before ``train.clip`` limits it."""
        trained = [p for p in self.states.parameters() if p.grad is not None]
        if self.train.clip:
            return float(self.accelerator.clip_grad_norm_(trained, self.train.clip))
        scaler = self.accelerator.scaler
        return float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])) / (
            scaler.get_scale() if scaler else 1.0
        )

    def _again(self) -> None:
        self.current.prepare_retry(self.run, self.states["method"])

    def _gradients(self) -> float:
        loss = self._backward(self.run.batch)
        self.current.after_backward(self.run, self.states["method"])
        return loss

    def _backward(self, micro: list[Batch | None]) -> float:
        """Gradients of the mean loss over the global batch, summed up from micro-batches and processes. Returns that mean."""
        counted, loss_sum = self._counted(micro), torch.zeros((), device=self.accelerator.device)
        for batch in micro:
            share = batch or self._stand_in(micro)
            with self.accelerator.autocast():
                logits = self.tuned(**self.on_device(share.inputs))
            task = self._losses(logits, share) * (batch is not None)
            added = self.current.loss(self.run, self.states["method"], share)  # counts once a step
            self.accelerator.backward(
                task * (1 / counted) + added / (len(micro) * self.accelerator.num_processes)
            )
            loss_sum += task.detach()
        loss = float(total(loss_sum)) / counted
        if not math.isfinite(loss):
            raise NotFinite(self.number + 1, loss, [i for b in micro if b for i in b.ids])
        add_gradients(p for p in self.states.parameters() if p.requires_grad)
        return loss

    def try_backward(self, batch: Batch) -> None:
        """Forward and backward of a batch, as training does them, for their memory."""
        self.tuned.train()
        with self.accelerator.autocast():
            logits = self.tuned(**self.on_device(batch.inputs))
        self.accelerator.backward(self._losses(logits, batch))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        drawn = rng.state() | {"method": self.run.generator.get_state()}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        states, optimizer = self.states.state_dict(), self.optimizer.state_dict()
        return {
            "phase": self.phase,
            "number": self.number,
            "states": states,
            "optimizer": optimizer,
            "scaler": scaler,
            "rng": drawn,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from ``saved``. Raises ``RuntimeError`` where it belongs to another method or model, ``ValueError`` for a step that there is not."""
        if not (0 <= saved["number"] <= self.train.steps and 0 <= saved["phase"] < len(self.phases)):
            raise ValueError(f"step {saved['number']} in phase {saved['phase']}")
        self.number = saved["number"]
        self.enter(saved["phase"])
        self.begun, self.run.step = True, max(0, self.number - 1 - self.phases[self.phase][1])
        self.states.load_state_dict(saved["states"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.run.generator.set_state(saved["rng"]["method"])
        rng.restore(saved["rng"])
