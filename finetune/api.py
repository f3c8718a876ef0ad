"""The Python front door: put a method on a model, train it in any loop, and run and read whole runs.

For example:
    handle = finetune.attach(model, "lora", rank=8, seed=0)
    optimizer = handle.optimizer(lr=1e-3)
    for batch in loader:
        with handle.step(optimizer):
            handle.module(**batch).loss.backward()
    handle.save("delta")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .core import attach as parts
from .core.method import Method, Run
from .core.zeros import describe_zeros
from .errors import ConfigError, FinetuneError
from .training.build import Pretrained, build_states
from .training.optimizer import make_optimizer

if TYPE_CHECKING:
    from transformers import TrainerCallback

Loss = Callable[[nn.Module, Any], tuple[Tensor, float]]
Upcoming = Callable[[int], Sequence[Sequence[Any]]]


class Module(nn.Module):
    """A model and what is trained on it, as one module that computes what the model computes.

    Its parameters include the trained ones, so that code which clips, counts or moves the parameters of a
    module reaches them.
    """

    def __init__(self, model: nn.Module, states: nn.Module) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        return self.model(*args, **kwargs)


class Handle:
    """A method on a model, to be trained by a loop of the caller's own. ``attach`` makes it.

    ``model``: the model with the method's parts attached. ``module``: the model and the trained tensors as
    one module; call its ``train`` and ``eval``, since parts with dropout have a mode too. ``method``: the
    method. ``number``: steps done.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        seed: int,
        steps: int,
        head: Sequence[str],
        loss: Loss | None,
        upcoming: Upcoming | None,
    ) -> None:
        self.model, self.method, self.number = model.requires_grad_(False), method, 0
        self._loss, self._upcoming, self._begun = loss, upcoming, False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._states = build_states(Pretrained(model, tuple(head)), method)
        device = next(model.parameters()).device
        self.module = Module(model, self._states).to(device)
        self._run = Run(
            model,
            self._states,
            torch.optim.SGD(self.parameters(), lr=0.0),  # until the first step brings the caller's
            total=steps,
            generator=torch.Generator().manual_seed(seed),
            evaluate=self._lacks("the loss of a batch"),
            upcoming=self._next_steps,
            backward=self._backward,
            logits=self._lacks("the logits of a batch"),
            reference=self._lacks("a reference model"),
            class_counts=self._lacks("the number of examples of each class"),
            stream_gradients=self._lacks("a data stream"),
        )

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained tensors: those of the method, and of the head if one was named."""
        return [parameter for parameter in self._states.parameters() if parameter.requires_grad]

    def optimizer(self, name: str = "adamw", **settings: Any) -> torch.optim.Optimizer:
        """Make an optimizer over the trained tensors, in groups that decay and that do not, as in a run.

        ``name``, ``settings``: as ``optimizer=NAME optimizer.SETTING=VALUE`` on the command line. The rate
        stays at ``lr``: a schedule is the caller's. Raises ``ConfigError`` for settings that do not exist,
        and for an optimizer that measures losses instead of using gradients.
        """
        chosen = _read_section("optimizer", name, settings)
        if not chosen.needs_grad:
            raise ConfigError(
                f"optimizer={name} measures losses itself, and the loop of the caller computes gradients. "
                "Train it by finetune.train instead."
            )
        return make_optimizer(self._states, chosen)

    @contextmanager
    def step(self, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Iterator[None]:
        """Train one step: run forward and backward of its loss inside the block.

        Entering runs what the method does before a step. Leaving completes the gradients, limits their norm
        to ``clip``, steps ``optimizer``, runs what the method does after a step, and clears the gradients.
        If the block raises, there is no step. Raises ``ConfigError`` if the method needs what ``attach`` was
        not given.
        """
        self._before(optimizer)
        try:
            yield
        except BaseException:
            optimizer.zero_grad(set_to_none=True)
            raise
        self._complete_gradients()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), clip)
        optimizer.step()
        self._after()
        optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Make the model the one before training, to the bit, inside the block."""
        with parts.base(self._states):
            yield

    def merge(self) -> nn.Module:
        """Write the change into the model's weights, and return the model with its plain layers.

        The handle is of no use afterwards. Raises ``ConfigError`` if no weight can hold the change.
        """
        parts.merge(self.model, self._states)
        return self.model

    def detach(self) -> nn.Module:
        """Take the method off, and return the model as it was before ``attach``."""
        parts.detach(self.model, self._states)
        return self.model

    def save(self, folder: str | Path) -> None:
        """Write the trained change to ``folder``: no tensor of the base.

        Raises ``ConfigError`` if there is something at ``folder`` already.
        """
        from .storage.delta import save_delta

        if Path(folder).exists():
            raise ConfigError(f"{folder} exists. Choose a new folder, or remove it.")
        save_delta(Path(folder), self._states, self._describe())

    def load(self, folder: str | Path) -> None:
        """Load the change that ``save`` wrote.

        Raises ``ConfigError`` if it is damaged, or belongs to another method or another model.
        """
        from .storage.delta import load_delta, read_description

        stored, own = read_description(Path(folder)), self._describe()
        if stored["config"] != own["config"]:
            raise ConfigError(
                f"{folder} was made by {stored['config'].get('method')}, and this is "
                f"{own['config']['method']}. Attach the method with the same settings."
            )
        if stored["base_fingerprint"] != own["base_fingerprint"]:
            raise ConfigError(f"{folder} was trained on a model with other weights. Attach to that model.")
        if stored.get("zeros") != own.get("zeros"):
            raise ConfigError(
                f"{folder} was trained on a model with other pruned entries. Attach to a model that holds "
                "the same entries at 0."
            )
        load_delta(Path(folder), self._states)
        self._begun, self.number = True, stored["step"]

    def callback(self) -> TrainerCallback:
        """Return the callback by which the ``Trainer`` of transformers trains this method.

        Give ``Trainer`` the model ``handle.module`` and ``optimizers=(handle.optimizer(...), None)``. The
        callback saves the change beside each of the trainer's checkpoints, in the folder ``finetune``.
        """
        from .training.trainer_callback import Callback

        return Callback(self)

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        run, state = self._run, self._states["method"]
        run.optimizer, run.step, run.metrics = optimizer, self.number, {}
        if not self._begun:
            self.method.begin(run, state, None)
            self._begun = True
        self.method.before_step(run, state)

    def _complete_gradients(self) -> None:
        run, state = self._run, self._states["method"]
        penalty = self.method.loss(run, state, None)
        if isinstance(penalty, Tensor):
            penalty.backward()
        self.method.after_backward(run, state)

    def _after(self) -> None:
        self.method.after_step(self._run, self._states["method"])
        self.number += 1

    def _next_steps(self, count: int) -> list[list[Any]]:
        if self._upcoming is None:
            raise self._lack("the batches of the next steps", "upcoming")
        return [list(step) for step in self._upcoming(count)]

    def _backward(self, batch: Any, step: list[Any], summed: bool, in_training: bool) -> None:
        """Run one micro-batch backward; see ``Run.backward``."""
        if self._loss is None:
            raise self._lack("the loss of a batch", "loss")
        training, count = self.module.training, 1.0
        try:
            if not summed:
                count = self._count(self._loss, step)
            self.module.train(in_training)
            total, _ = self._loss(self.model, batch)
            (total / count).backward()
        finally:
            for parameter in self.parameters():
                parameter.grad = None
            self.module.train(training)

    @torch.no_grad()
    def _count(self, loss: Loss, step: list[Any]) -> float:
        """Return the count of a step's micro-batches together, as the caller's loss gives it."""
        self.module.eval()
        return sum(loss(self.model, batch)[1] for batch in step)

    def _lack(self, what: str, argument: str = "") -> ConfigError:
        named = f"method={self.method.name}"
        if not argument:
            return ConfigError(f"{named} needs {what}. Train it by finetune.train instead.")
        return ConfigError(f"{named} needs {what}: give attach(..., {argument}=...), or use finetune.train.")

    def _lacks(self, what: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> Any:
            raise self._lack(what)

        return refuse

    def _describe(self) -> dict[str, Any]:
        """Return the content of ``delta.json``."""
        from .config.settings import to_plain
        from .models.stored import fingerprint

        trained = parts.trained_in_place(self._states)
        return {
            "method": self.method.name,
            "config": {"method": json.loads(json.dumps(to_plain(self.method)))},  # as it is read again
            "task": "",
            "labels": [],
            "head": [],
            "step": self.number,
            "base_fingerprint": fingerprint(self.model, trained),
            **describe_zeros(self.model),
        }


def attach(
    model: nn.Module,
    method: str | Method,
    *,
    seed: int = 0,
    steps: int = 1000,
    head: Sequence[str] = (),
    loss: Loss | None = None,
    upcoming: Upcoming | None = None,
    **options: Any,
) -> Handle:
    """Put a method on a model, and return the handle by which a loop trains it.

    ``model``: any torch model with linear layers; its parameters are frozen. ``method``: a name with
    ``options``, as ``method=NAME method.OPTION=VALUE`` on the command line, or an instance. ``seed``: of the
    start values and of the method's draws; the global generator is not touched. ``steps``: steps in all,
    which schedules of the method count. ``head``: names of parameters that are trained as they are, such as a
    new head. Methods that choose entries by gradients also need ``loss``, which returns the loss of a batch
    as a sum and a count, and ``upcoming``, which returns the batches of the next steps: for each step a list
    of micro-batches.

    Raises ``ConfigError`` for a name or option that does not exist, and where the method does not fit the
    model, has several phases, which only ``train`` runs, or meets another method on the model.
    """
    if parts.has_parts(model):
        raise ConfigError(
            "The model has a method attached already. Call merge() or detach() of its handle first."
        )
    if not isinstance(method, str):
        chosen = method
        if options:
            raise ConfigError(f"The options {', '.join(options)} go with a method's name, not an instance.")
    else:
        chosen = _read_section("method", method, options)
    faults = chosen.faults(steps)
    if len(chosen.phases()) > 1:
        faults.append(f"method={chosen.name} trains in several phases. Train it by finetune.train instead.")
    if faults:
        raise ConfigError(*faults)
    return Handle(model, chosen, seed, steps, head, loss, upcoming)


def _read_section(kind: str, name: str, options: dict[str, Any]) -> Any:
    """Return the checked instance that ``kind=name kind.OPTION=VALUE`` choose."""
    from .config.load import load as load_config
    from .report.command import show_override

    words = [f"{kind}={name}"]
    for option, value in options.items():
        words.append(f"{kind}.{option}={show_override(value)}")
    try:
        return load_config(words).section(kind)
    except ConfigError as error:
        raise ConfigError(*(fault.replace(" (command line)", "") for fault in error.faults)) from None


class Finished(NamedTuple):
    """A run that ``train`` has finished: its folder, and the content of its ``result.json``."""

    folder: Path
    result: dict[str, Any]


def train(*overrides: str, plugins: Sequence[str | Path] = ()) -> Finished:
    """Train the run that ``finetune train OVERRIDES`` trains, in this process.

    A finished run is not trained again. Raises ``ConfigError`` for a fault in the overrides, ``RunFailed`` if
    the run fails, and ``KeyboardInterrupt`` after a signal; the step is saved then.
    """
    from .config.load import load as load_config
    from .launch import child
    from .launch.start import StartOptions
    from .storage.run_folder import run_folder

    options = StartOptions(tuple(str(Path(folder).absolute()) for folder in plugins))
    found: list[Finished] = []

    def read() -> tuple[Any, Path]:
        options.apply()
        config = load_config(list(overrides))
        return config, run_folder(config)

    if child.train(read, options, report=lambda result, folder: found.append(Finished(folder, result))):
        raise KeyboardInterrupt
    return found[0]


def load(run: str | Path) -> nn.Module:
    """Return the tuned model of a run, in eval mode, with the method's parts attached.

    ``run``: the folder of a run. Raises ``ConfigError`` if it is not one, or its base has changed.
    """
    from .artifacts.reopen import rebuild

    session = rebuild(Path(run)).session
    session.tuned.eval()  # the attached parts, too, which are no submodules of the model
    return session.model


def runs(folder: str | Path = "outputs") -> Any:
    """Return the runs below ``folder`` as a table, one row per run.

    Columns: path, status, error, seed, each metric (``test.accuracy``), each number of parameters and cost
    (``params.trained``), and each setting (``method.rank``). A pandas ``DataFrame`` if pandas is installed,
    otherwise a list of dictionaries. Raises ``ConfigError`` if there is no run.
    """
    from .report.runs import find_runs, read_runs

    rows = [run.as_row() for run in read_runs(find_runs([Path(folder)]))]
    try:
        import pandas  # type: ignore[import-untyped]  # its types are a package of their own
    except ImportError:
        return rows
    return pandas.DataFrame(rows)


__all__ = ["ConfigError", "FinetuneError", "Finished", "Handle", "Module", "attach", "load", "runs", "train"]
