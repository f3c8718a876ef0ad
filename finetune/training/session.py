"""Train one method on one model, phase by phase and step by step.

The session knows no method by name; ``core/method.py`` gives the order in which it calls them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.settings import TrainConfig
from ..core.attach import detach
from ..core.collective import broadcast_
from ..core.method import Method, Run
from ..core.objective import Objective
from ..core.optimizer import Optimizer
from ..core.selector import Selector
from ..core.zeros import layers_with_zeros
from ..data.encode import TRAIN, Batch
from ..errors import ConfigError, RunFailed
from ..objectives.task import Task
from ..system import random_state
from .batches import Batches
from .build import Pretrained, build_states
from .compute import Compute, MicroBatches, Tuned, prepare_to_show
from .memory import ADVICE, Memory, ran_out, rng_restore, rng_snapshot
from .optimizer import make_optimizer, rate
from .optimizer_state import load_optimizer, save_optimizer
from .phases import attached_phases, plan_phases
from .reference import References

LOSS_SCALES = 40  # how often fp16 may halve its loss scale in one step


class NotFinite(RunFailed):
    """The loss (or ``what``) became NaN or infinite at ``step``; ``ids`` are the examples of that step."""

    def __init__(self, step: int, value: float, ids: list[str], what: str = "loss") -> None:
        super().__init__(f"The {what} is {value} at step {step}.")
        self.step, self.ids = step, ids


@dataclass(frozen=True)
class Recipe:
    """What is done to a pretrained model: the method and the settings of its training."""

    method: Method
    optimizer: Optimizer
    train: TrainConfig
    seed: int
    selector: Selector = field(default_factory=Selector)
    objective: Objective = field(default_factory=Task)


@dataclass(frozen=True)
class Step:
    """A finished optimizer step. ``number`` counts from 1 over the whole run; ``lr`` is its learning rate."""

    number: int
    loss: float
    lr: float
    seconds: float
    metrics: dict[str, float]


class Session:
    """A method in training on a model.

    ``steps()`` trains. ``state_dict()`` after any step is enough to resume from there to the same bits.
    """

    def __init__(
        self, pretrained: Pretrained, recipe: Recipe, batches: Batches, accelerator: Accelerator
    ) -> None:
        self.pretrained, self.recipe = pretrained, recipe
        self.batches, self.accelerator = batches, accelerator
        self.model = pretrained.model.requires_grad_(False)
        self.method, self.selector = recipe.method, recipe.selector
        self.phases = plan_phases(recipe.method, recipe.train.steps, recipe.objective)
        self.number = 0  # optimizer steps done
        self.phase = -1
        self.states = nn.ModuleDict()
        self.compute = Compute(batches, accelerator)
        self.references = References(pretrained, accelerator)
        self.memory = Memory(self, accelerator.device)
        self._build(0)
        if len(self.phases) > 1 and any(layers_with_zeros(self.model)):
            self._build_every_phase()

    def _build_every_phase(self) -> None:
        """Raise ``ConfigError`` now, and not in mid-run, if a later phase cannot keep pruned entries at 0."""
        for phase in range(1, len(self.phases)):
            self.enter(phase)
        self.rebuild()

    def check_objectives(self) -> None:
        """Raise ``ConfigError`` if an objective does not fit the data or the model; read its teacher.

        Also raise it if the selector lacks a data stream.
        """
        for name in self.selector.streams():
            if name not in self.batches.sets:
                raise ConfigError(f"selector={self.selector.name} needs the data stream {name}.")
        for planned in self.phases:
            for name in planned.objective.streams():
                if name not in self.batches.sets:
                    raise ConfigError(f"objective={planned.objective.name} needs the data stream {name}.")
            planned.objective.check(self.run)

    def check_phases(self) -> None:
        """Build every phase once and return to the first.

        Raises ``ConfigError`` if a method does not fit the model, so that nothing is trained in vain.
        """
        if len(self.phases) == 1:
            return
        for phase in range(1, len(self.phases)):
            self.enter(phase)
        self.rebuild()

    @property
    def tuned(self) -> Tuned:
        """The model with the states of the current phase."""
        return self.compute.tuned

    @property
    def phase_and_target_met(self) -> list[int]:
        """The current phase, and 1 if its method has reached what its settings ask for, else 0."""
        return [self.phase, int(self.current.meets_target(self.run.step, self.run.total))]

    def enter(self, phase: int) -> None:
        """Stand at the beginning of a phase.

        The parts of the phase before are detached, or stay below those of the new phase if it keeps them.
        """
        if phase == self.phase:
            return
        first = phase + 1 - len(attached_phases(self.phases, phase))
        if not first <= self.phase < phase:
            detach(self.model, self.states)
            self._build(first)
        for after in range(self.phase + 1, phase + 1):
            self._build(after, self.states)

    def rebuild(self) -> None:
        """Stand at the beginning of the first phase, as if nothing had been done."""
        detach(self.model, self.states)
        self._build(0)

    def _build(self, phase: int, previous: nn.ModuleDict | None = None) -> None:
        """Build the phase's states, the optimizer over them, and the ``Run`` that the method sees.

        ``previous``: the states of the phase before, if their parts stay attached.
        """
        self.phase, self.begun, planned = phase, False, self.phases[phase]
        self.current = planned.method
        random_state.seed(self.recipe.seed + phase)
        self.states = build_states(self.pretrained, self.current, self.selector, previous)
        self.accelerator.free_memory()
        self.compute.tuned = Tuned(self.model, self.states).to(self.accelerator.device)
        broadcast_(self.states.state_dict().values())
        optimizer = make_optimizer(self.states, self.recipe.optimizer)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.run = Run(
            self.model,
            self.states,
            self.optimizer,
            total=planned.end - planned.start,
            generator=torch.Generator().manual_seed(self.recipe.seed + phase),
            evaluate=self.compute.mean_loss,
            upcoming=self._upcoming,
            backward=self.compute.probe,
            logits=self.compute.scored_logits,
            reference=self.references.get,
            class_counts=self._count_classes,
            stream_gradients=self._stream_gradients,
            seed=self.recipe.seed + phase,
            step=self.number - planned.start,
        )
        streams = [name for name in planned.objective.streams() if name in self.batches.sets]
        self.batches.used = (TRAIN, *streams)  # all of them in a session that trains
        self.compute.run, self.compute.objective = self.run, planned.objective
        prepare_to_show(self.model, planned.objective.needs)
        self.references.enter(self.states, planned.objective.needs)

    def _upcoming(self, steps: int) -> list[MicroBatches]:
        return list(self.batches.steps(self.number, self.number + steps))

    def _stream_gradients(self, stream: str) -> AbstractContextManager[float]:
        return self.compute.gradients(self.batches.step_of(stream, self.number))

    def _count_classes(self) -> list[int] | None:
        labels = self.batches.data.labels
        if labels is None:
            return None
        model: Any = self.model
        counts = torch.bincount(torch.tensor(labels), minlength=model.config.num_labels)
        found: list[int] = counts.tolist()
        return found

    def start(self, previous: nn.Module | None = None) -> None:
        """Let the phase's method set its values; once per phase, not on resume."""
        self.begun = True
        self.memory.retry_smaller(lambda: self.current.begin(self.run, self.states["method"], previous))

    def steps(self) -> Generator[Step, None, None]:
        """Train from where the session stands to the end; yield after every optimizer step."""
        for phase in range(self.phase, len(self.phases)):
            if phase != self.phase:
                previous = self.states["method"]
                self.enter(phase)
                self.start(previous)
            elif not self.begun:
                self.start()
            start, end = self.phases[phase].start, self.phases[phase].end
            for micro in self.batches.steps(self.number, end):
                self.run.step = self.number - start
                yield self._step(micro)

    def _step(self, micro: MicroBatches) -> Step:
        began = time.perf_counter()
        self.tuned.train()
        method_state, selector_state = self.states["method"], self.states["selector"]
        run, retry_smaller = self.run, self.memory.retry_smaller
        run.batch, run.metrics = micro, {}
        if self.accelerator.num_processes > 1:
            # each process draws its own numbers, and the checkpoint of one process serves all
            torch.manual_seed(hash((self.recipe.seed, self.number, self.accelerator.process_index)) % 2**63)
        start, end = self.phases[self.phase].lr_start, self.phases[self.phase].lr_end
        lr = self.recipe.optimizer.lr * rate(self.recipe.optimizer, self.number - start, end - start)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        retry_smaller(lambda: self.current.before_step(run, method_state))
        retry_smaller(lambda: self.selector.before_step(run, selector_state))
        loss = self._update() if self.selector.trains(selector_state) else self._skip()
        self.current.after_step(run, method_state)
        self.selector.after_step(run, selector_state)
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return Step(self.number, loss, lr, time.perf_counter() - began, run.metrics)

    def _skip(self) -> float:
        """Return the loss of a step in which nothing moves."""
        losses = self.memory.retry_smaller(self._measure, self._prepare_retry)
        loss, _ = losses.pop("loss"), losses.pop("added")
        self.run.log(**losses, grad_norm=0.0)
        return loss

    def _update(self) -> float:
        """Move the trained values once; return the loss."""
        if self.recipe.optimizer.needs_grad:
            return self._update_by_gradients()
        return self._update_by_losses()

    def _update_by_losses(self) -> float:
        """Let the optimizer measure losses and move the trained values; return the mean of these losses."""
        measured: list[dict[str, float]] = []
        self._step_optimizer(measured)
        means = {}
        for name in measured[0]:
            means[name] = statistics.fmean(losses[name] for losses in measured)
        loss = means.pop("loss")
        del means["added"]
        self.run.log(**means)
        return loss

    def _evaluate(self, measured: list[dict[str, float]]) -> float:
        """Return the loss of the step's batch with the method's penalty; append its terms to ``measured``.

        An evaluation that runs out of memory is repeated at the same trained values.
        """
        losses = self.memory.retry_smaller(self._measure, self._prepare_retry)
        measured.append(losses)
        return losses["loss"] + losses["added"]

    def _measure(self) -> dict[str, float]:
        """Measure the step's batch without gradient: its ``loss``, the method's ``added`` loss, and terms.

        Raises ``NotFinite``.
        """
        loss, terms = self.compute.evaluate(self.run.batch)
        added = self.compute.evaluate_added(self.run.batch, self._added_loss)
        if not math.isfinite(loss + added):
            raise NotFinite(self.number + 1, loss + added, _ids(self.run.batch))
        return {"loss": loss, "added": added, **_name_terms(terms)}

    def _update_by_gradients(self) -> float:
        """Compute gradients and let the optimizer use them; return the loss.

        Where fp16 gradients overflow, the step is retried at half the loss scale; no schedule has counted it.
        """
        snapshot, scaler = rng_snapshot(self.run.generator, self.accelerator.device), self.accelerator.scaler
        for _ in range(LOSS_SCALES):
            loss = self.memory.retry_smaller(self._gradients, self._prepare_retry)
            scale = scaler.get_scale() if scaler else 0.0
            self.run.log(grad_norm=self._clip())
            self._step_optimizer([])
            # a lower scale means overflow; fused optimizers skip a step without telling ``step_was_skipped``
            if not scaler or scaler.get_scale() >= scale:
                return loss
            self.optimizer.zero_grad(set_to_none=True)
            rng_restore(self.run.generator, snapshot)
            self._prepare_retry()
        raise NotFinite(self.number + 1, math.inf, _ids(self.run.batch), "gradient at every loss scale")

    def _step_optimizer(self, measured: list[dict[str, float]]) -> None:
        """Let the optimizer move the trained values; the losses that it asks for go to ``measured``."""
        try:
            self.recipe.optimizer.step(self.run, partial(self._evaluate, measured))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise RunFailed(f"Memory ran out in the optimizer, at step {self.number + 1}. {ADVICE}") from None

    def _clip(self) -> float:
        """Limit the norm of all gradients together to ``train.clip``; return the norm from before."""
        trained = [p for p in self.states.parameters() if p.grad is not None]
        if self.recipe.train.clip:
            return float(self.accelerator.clip_grad_norm_(trained, self.recipe.train.clip))
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        return norm / self.accelerator.scaler.get_scale() if self.accelerator.scaler else norm

    def _prepare_retry(self) -> None:
        self.current.prepare_retry(self.run, self.states["method"])

    def _gradients(self) -> float:
        loss = self._backward(self.run.batch)
        self.current.after_backward(self.run, self.states["method"])
        return loss

    def _backward(self, micro: MicroBatches) -> float:
        """Compute the gradients of a step; return its mean loss. Raises ``NotFinite``."""
        loss, terms = self.compute.backward(micro, self._added_loss)
        self.run.log(**_name_terms(terms))
        if not math.isfinite(loss):
            raise NotFinite(self.number + 1, loss, _ids(micro))
        self.compute.share_gradients()
        return loss

    def _added_loss(self, batch: Batch) -> Tensor | float:
        return self.current.loss(self.run, self.states["method"], batch)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on.

        ``states`` and ``rng``: tensors by name; ``optimizer``: see ``save_optimizer``; ``phase``, ``number``
        and ``scaler``: values that JSON can hold.
        """
        scaler = self.accelerator.scaler
        return {
            "phase": self.phase,
            "number": self.number,
            "states": self.states.state_dict(),
            "optimizer": save_optimizer(self.optimizer, self.states),
            "scaler": scaler.state_dict() if scaler else None,
            "rng": random_state.state() | {"method": self.run.generator.get_state()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resume from ``saved``.

        Raises ``RuntimeError`` or ``ValueError`` where it belongs to another method, model or run.
        """
        number, phase = saved["number"], saved["phase"]
        if not (0 <= number <= self.recipe.train.steps and 0 <= phase < len(self.phases)):
            raise ValueError(f"step {number} in phase {phase}")
        self.number = number
        self.enter(phase)
        self.begun, self.run.step = True, max(0, number - 1 - self.phases[phase].start)
        self.states.load_state_dict(saved["states"])
        load_optimizer(self.optimizer, self.states, saved["optimizer"])
        if saved["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.run.generator.set_state(saved["rng"]["method"])
        random_state.restore(saved["rng"])


def _name_terms(terms: dict[str, float]) -> dict[str, float]:
    """Return the mean of each term by the name of its metric, if there are several."""
    if len(terms) < 2:
        return {}
    return {f"loss_{name}": mean for name, mean in terms.items()}


def _ids(micro: MicroBatches) -> list[str]:
    """Return the ids of the examples of a step, as far as this process has them."""
    found = []
    for batch in micro:
        if batch:
            found += batch.ids
    return found
