"""Check what every method must guarantee: ``check(lambda: LoRA(rank=4))``.

No check compares a method with itself alone. The references are the untouched model, an uninterrupted run,
the whole batch, and the plain model after merging. One training of six steps serves most checks (see
``Trial``). The functions of ``sessions``, such as ``begin``, are also offered here, for the test of a method.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..config.settings import TrainConfig
from ..core.attach import NotMergeable, base, detach, merge, patched
from ..core.method import Method
from ..core.objective import Objective
from ..core.optimizer import Optimizer
from ..core.selector import Selector
from ..core.zeros import find_pruned, layers_with_zeros, stored_mask
from ..errors import ConfigError
from ..objectives.task import Task
from ..storage import checkpoint
from ..storage.delta import load_delta, save_delta
from ..system import random_state
from ..training.session import Session, Step
from .sessions import (
    STEPS,
    TRAIN,
    Kind,
    Standing,
    begin,
    examples,
    finish,
    logits,
    same_session,
    same_values,
    tiny,
    tiny_pruned,
    trained_values,
)

__all__ = [
    "CHECKS",
    "STEPS",
    "TRAIN",
    "Kind",
    "Make",
    "Trained",
    "Trial",
    "begin",
    "check",
    "examples",
    "finish",
    "logits",
    "same_session",
    "same_values",
    "tiny",
]

Make = Callable[[], Method]
SAVED = (1, STEPS // 2, STEPS - 1, STEPS)  # the steps after which a training writes checkpoints


class Trained:
    """One training of a case from start to end, and what was recorded on the way.

    ``session``: the session after the last step. ``start``: the logits before the first step. ``live``: the
    logits after the last. ``steps``: each step as text. ``standings``: what the run depended on after each of
    ``SAVED``, where a checkpoint was written, too. ``still``: trained tensors that no step moved.
    ``frozen_gradients``: names of frozen parameters that hold a gradient.
    """

    def __init__(self, trial: Trial) -> None:
        self._folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._folder)
        self.session = session = trial.begin()
        session.start()
        self.start = logits(session.tuned, trial.kind)
        before = trained_values(session)
        self.steps: list[str] = []
        self.standings: dict[int, Standing] = {}
        for step in session.steps():
            self.steps.append(_as_text(step))
            if step.number in SAVED:
                self.standings[step.number] = Standing.read(session)
                checkpoint.save(self.checkpoint(step.number), session, {"at": step.number})
        self.still = []
        for name, parameter in session.states.named_parameters():
            if name in before and torch.equal(parameter, before[name]):
                self.still.append(name)
        trained = {id(p) for p in session.states.parameters()}
        self.frozen_gradients = []
        for name, parameter in session.model.named_parameters():
            if id(parameter) not in trained and parameter.grad is not None:
                self.frozen_gradients.append(name)
        self.live = logits(session.tuned, trial.kind)
        save_delta(self.delta, session.states, {})

    @property
    def delta(self) -> Path:
        """The folder of the stored change."""
        return self._folder / "delta"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after ``step``."""
        return self._folder / str(step)


class Trial:
    """One method on one kind of model, as the checks try it. It is trained when a check first needs it.

    ``make`` gives a new instance of the method, ``choose`` a new selector. ``optimizer`` is by default
    ``sessions.OPTIMIZER``.
    """

    def __init__(
        self,
        make: Make,
        kind: Kind = "vit",
        train: TrainConfig = TRAIN,
        choose: Callable[[], Selector] = Selector,
        optimizer: Optimizer | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.make, self.kind, self.train = make, kind, train
        self.choose, self.optimizer = choose, optimizer
        self.objective = objective or Task()

    @cached_property
    def trained(self) -> Trained:
        """The training that the checks share. A check that changes its session must use ``take_trained``."""
        return Trained(self)

    def take_trained(self) -> Trained:
        """Hand over the training to a check that takes its session apart; a later check trains again."""
        taken = self.trained
        del self.trained
        return taken

    def begin(
        self, seed: int = 0, model: Any = None, loss_scale: float | None = None, **train: Any
    ) -> Session:
        """Make a new session, on ``model`` if one is given, with changes to the settings of training."""
        return begin(
            self.make(),
            self.kind,
            replace(self.train, **train),
            seed,
            model,
            self.choose(),
            self.optimizer,
            self.objective,
            loss_scale,
        )

    def resume(self, step: int) -> Session:
        """Make a new session that continues the training from its checkpoint after ``step``."""
        session = self.begin()
        random_state.seed(step)  # a new process starts with other random states
        assert checkpoint.load(self.trained.checkpoint(step), session) == {"at": step}
        return session


def check_step_zero(trial: Trial) -> None:
    """The output before the first step equals the base's exactly if the method says ``neutral_start``."""
    neutral, base_logits = trial.make().neutral_start, logits(tiny(trial.kind), trial.kind)
    if neutral:
        equal = torch.allclose(trial.trained.start, base_logits, atol=1e-6)
        assert equal, "neutral_start=True, but the output before the first step is not the base's"
    else:
        differs = not torch.equal(trial.trained.start, base_logits)
        assert differs, "neutral_start=False, but the output before the first step is the base's"


def check_gradients(trial: Trial) -> None:
    """Training moves every trained tensor, and no frozen parameter gets a gradient."""
    still = trial.trained.still
    assert trial.make().unused_parameters or not still, f"never moved: {still}"
    frozen = trial.trained.frozen_gradients
    assert not frozen, f"frozen, but with a gradient: {frozen}"


def check_stored(trial: Trial) -> None:
    """The stored change, loaded onto a new base, gives the same output to the bit."""
    trained, new = trial.trained, trial.begin()
    new.enter(trained.session.phase)
    load_delta(trained.delta, new.states)
    assert torch.equal(trained.live, logits(new.tuned, trial.kind)), "the stored change gives another output"


def check_merge(trial: Trial) -> None:
    """Merged into plain layers, the model computes what it computed with parts attached.

    A method that says ``mergeable=False`` must be refused, with nothing changed.
    """
    session = trial.resume(STEPS)
    live = logits(session.tuned, trial.kind)
    try:
        merge(session.model, session.states)
    except NotMergeable:
        assert not trial.make().mergeable, "mergeable=True, but a part cannot be merged"
        assert torch.equal(live, logits(session.tuned, trial.kind)), "a refused merge changed the model"
        return
    assert trial.make().mergeable, "mergeable=False, but the model was merged"
    original = tiny(trial.kind)
    assert not patched(session.model), "a patched layer is left"
    assert type(session.model) is type(original)
    names = {name for name, _ in session.model.named_parameters()}
    assert names == {name for name, _ in original.named_parameters()}, "the merged model is not plain"
    torch.testing.assert_close(logits(session.model, trial.kind), live, atol=2e-5, rtol=1e-4)


def check_resume(trial: Trial) -> None:
    """A run that continues from any of its checkpoints reaches the next one, and the end, with the same bits.

    A new session runs each stretch between two checkpoints again. If a checkpoint lacks a value, the stretch
    that uses the value differs.
    """
    whole = trial.trained
    for start, end in pairwise((*SAVED, STEPS)):
        resumed, steps = trial.resume(start), []
        for step in resumed.steps():
            steps.append(_as_text(step))
            if step.number == end:
                break
        assert steps == whole.steps[start:end], f"what is reported of the steps after {start} differs"
        Standing.read(resumed).check_equal(whole.standings[end])


def check_base_untouched(trial: Trial) -> None:
    """Training changes the model; in ``base`` and after ``detach`` it is the pretrained one to the bit."""
    original, trained = tiny(trial.kind), trial.take_trained()
    session, base_logits = trained.session, logits(original, trial.kind)
    assert not torch.equal(trained.live, base_logits), "training changed nothing"
    with base(session.states):
        inside = logits(session.tuned, trial.kind)
    assert torch.equal(inside, base_logits), "inside base() the output differs from the base's"
    detach(session.model, session.states)
    same_values(session.model, original)


def check_same_seed(trial: Trial) -> None:
    """A second run of the same seed has the same bits, and a run of another seed other ones.

    Both take one step, since ``check_resume`` repeats the others.
    """
    same = trial.begin()
    next(same.steps())
    Standing.read(same).check_equal(trial.trained.standings[1])
    other = trial.begin(seed=1)
    next(other.steps())
    left, right = same.states.state_dict(), other.states.state_dict()
    equal = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert not equal, "the seed changes nothing"


def check_accumulation(trial: Trial) -> None:
    """Micro-batches of unequal size (and token count) give the gradients and the loss of the whole batch."""
    whole, parts = trial.begin(), trial.begin(micro_batch_size=3)
    for session in (whole, parts):
        session.start()
    compare_steps(whole, parts)


def run_backward(session: Session) -> float:
    """Run the backward pass of the first step in eval mode; return its loss."""
    session.tuned.eval()  # without dropout, whose draws depend on the batch's shape
    return session._backward(next(session.batches.steps(0, 1)))


def compare_steps(whole: Session, parts: Session) -> None:
    """Raise ``AssertionError`` unless a step of ``parts`` has the loss and the gradients of ``whole``."""
    losses = [run_backward(session) for session in (whole, parts)]
    assert abs(losses[0] - losses[1]) < 1e-5, "the loss differs"
    gradients = []
    for session in (whole, parts):
        gradients.append([p.grad for p in session.states.parameters() if p.requires_grad])
    largest = max(float(gradient.abs().max()) for gradient in gradients[0] if gradient is not None)
    for expected, summed in zip(*gradients, strict=True):
        assert (expected is None) == (summed is None)
        if expected is not None and summed is not None:
            torch.testing.assert_close(summed, expected, rtol=1e-3, atol=1e-6 * largest)


def check_bf16(trial: Trial) -> None:
    """On a bfloat16 base the trained values are float32, finite and moved, and the base stays as it was."""
    original = tiny(trial.kind).bfloat16()
    session = trial.begin(model=tiny(trial.kind).bfloat16(), precision="bf16")
    session.start()
    before = trained_values(session)
    finish(session)
    moved = False
    for name, value in trained_values(session).items():
        assert value.dtype == torch.float32, f"{name} is {value.dtype}"
        assert value.isfinite().all(), f"{name} is not finite"
        start = before.get(
            name, torch.zeros_like(value)
        )  # a later phase has new parameters; banks start at 0
        moved |= not torch.equal(value, start)
    assert moved, "nothing moved"
    detach(session.model, session.states)
    same_values(session.model, original)


def check_zeros(trial: Trial) -> None:
    """Every pruned entry of a pruned model stays 0, or the method is refused in words before it trains."""
    try:
        session = trial.begin(model=tiny_pruned(trial.kind))
    except ConfigError as error:
        if "model.zeros=free" not in str(error):
            raise AssertionError(f"refused without the cure model.zeros=free: {error}") from None
        return
    finish(session)
    model = session.model
    session.tuned.eval()
    _check_products(model)
    _check_pruned_entries(model)
    with base(session.states):
        _check_pruned_entries(model)
    try:
        merge(model, session.states)
    except NotMergeable:
        return
    except ConfigError as error:
        raise AssertionError(f"a pruned entry is not 0 in the merged model: {error}") from None
    _check_pruned_entries(model)


@torch.no_grad()
def _check_products(model: torch.nn.Module) -> None:
    """Raise ``AssertionError`` if a product with a weight that is changed uses a pruned entry of it."""
    for name, layer in patched(model).items():
        pruned, weight = find_pruned(layer.base), layer.original
        if pruned is not None:
            inputs = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            effect = layer.forward(inputs) - layer.forward(torch.zeros_like(inputs))
            assert not effect.T[pruned].any(), f"{name} computes with pruned entries that are not 0"


def _check_pruned_entries(model: torch.nn.Module) -> None:
    """Raise ``AssertionError`` unless the bits of all pruned entries are those of 0."""
    for name, layer in layers_with_zeros(model):
        pruned, weight = stored_mask(layer), layer.get_parameter("weight").detach()
        assert pruned is not None
        bits = weight[pruned].view(torch.uint8)
        assert not bits.any(), f"pruned entries of {name} are not 0"


# In this order: check_base_untouched takes apart the session that the checks before it share.
CHECKS: dict[str, Callable[[Trial], None]] = {
    "step_zero": check_step_zero,
    "gradients": check_gradients,
    "stored": check_stored,
    "merge": check_merge,
    "resume": check_resume,
    "same_seed": check_same_seed,
    "base_untouched": check_base_untouched,
    "accumulation": check_accumulation,
    "bf16": check_bf16,
    "zeros": check_zeros,
}


def check(make: Make, kind: Kind = "vit") -> None:
    """Run every check of ``CHECKS``. ``make`` gives a new instance of the method."""
    run_checks(CHECKS, Trial(make, kind))


def run_checks(checks: Mapping[str, Callable[[Trial], None]], trial: Trial) -> None:
    """Run every one of ``checks`` on one trial, in their order."""
    for run_check in checks.values():
        run_check(trial)


def _as_text(step: Step) -> str:
    """Write all of a step but its time as text, in which NaN equals itself."""
    return repr((step.number, step.loss, step.lr, sorted(step.metrics.items())))
