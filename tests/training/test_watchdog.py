"""Check that a run finds planted faults in itself, and that healthy runs cause no alarm."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from finetune.core.attach import patched
from finetune.core.lowrank import LowRank
from finetune.core.method import Method
from finetune.methods.baseline.bitfit import BitFit
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.peft import Peft
from finetune.methods.reparam.snell import SNELL
from finetune.methods.reparam.snella import SNELLA
from finetune.methods.sparse.hft import HFT
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.methods.sparse.s2ft import S2FT
from finetune.methods.sparse.sara import SaRA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.sparse import Crossing
from finetune.models.stored import fingerprint
from finetune.report.summary import describe_result
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.grow import Grow
from finetune.schedules.narrow import Narrow
from finetune.schedules.ramp import Ramp
from finetune.selectors.ist import IST
from finetune.storage.delta import save_delta
from finetune.storage.progress import ProgressRecord, WatchRecord, read_progress
from finetune.testing import contract
from finetune.training import watchdog
from finetune.training.session import Session, Step
from finetune.training.suspicions import FrozenState, find_suspicions

from ..support.plain_runs import Runs

Series = list[float]


def find_warnings(
    losses: Series, norms: Series | None = None, marks: dict[int, dict[str, float]] | None = None
) -> list[str]:
    """Return the warnings for these losses and gradient norms; the record goes through JSON at times."""
    state, said, session = WatchRecord(), list[str](), _still()
    for i, loss in enumerate(losses):
        metrics = {"grad_norm": norms[i] if norms else 1.0} | (marks or {}).get(i, {})
        said += watchdog.observe(state, session, Step(i + 1, loss, 1e-3, 0.1, metrics))
        state = stored_and_read(state) if i % 40 == 0 else state
    assert state.warnings == said
    return said


def stored_and_read(state: WatchRecord) -> WatchRecord:
    """Return the record as a resumed run reads it from a checkpoint."""
    text = json.dumps(ProgressRecord(watch=state).to_json(), allow_nan=False)
    return read_progress(Path("step-1"), json.loads(text)).watch


def _still() -> Any:
    """Make a stub of a session without parts."""
    return SimpleNamespace(
        phase=0, states=nn.ModuleDict(), current=LoRA(), selector=SimpleNamespace(unused_parameters=False)
    )


def noisy(seed: int, steps: int = 160, largest: float = 0.5) -> Series:
    """Return a falling loss with one of several curves and kinds of noise, as small batches give it."""
    draw = np.random.default_rng(seed)
    at = np.arange(steps) / steps
    start, end, size = draw.uniform(0.5, 11), draw.uniform(0.001, 0.4), draw.uniform(0.01, largest)
    curves = [
        start * np.exp(-draw.uniform(1, 8) * at) + end,
        start * (1 - at) + end,
        start / (1 + draw.uniform(1, 60) * at),
        start * (1 - 0.1 * at),
    ]
    noises = [
        1 + size * draw.uniform(-1, 1, steps),
        np.exp(size * draw.standard_normal(steps)),
        draw.gamma(1 / size, size, steps),
        1 + np.clip(0.3 * size * draw.standard_t(5, steps), -0.9, None),
    ]
    return [float(x) for x in curves[seed % 4] * noises[seed // 4 % 4]]


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_false_alarm_on_noisy_falling_series(count: int) -> None:
    alarms = {seed: said for seed in range(count) if (said := find_warnings(noisy(seed), noisy(seed + 5000)))}
    assert not alarms


@pytest.mark.parametrize(("largest", "times"), [(0.1, 4.0), (0.5, 1000.0)])
def test_every_planted_spike_is_reported_once_with_its_step(largest: float, times: float) -> None:
    """A spike is 4 times the largest loss where noise is small, 1000 times where it is half the loss."""
    for seed in range(60):
        losses, at = noisy(seed, largest=largest), 40 + seed
        spike = times * max(losses)
        spiked = [*losses[:at], spike, *losses[at + 1 : at + 20], spike, *losses[at + 21 :]]
        (line,) = find_warnings(spiked)
        assert line.startswith("The loss rose to ")
        assert f"at step {at + 1}," in line
        (line,) = find_warnings(losses, [10 * x if x == spike else x for x in spiked])
        assert line.startswith("The gradient's norm rose to ")
        assert f"at step {at + 1}," in line


def test_what_is_no_spike() -> None:
    steady = [0.5 + 0.01 * (i % 3) for i in range(100)]
    assert not find_warnings([*steady[:50], 0.9, *steady])  # too low
    assert not find_warnings([*steady[:15], 50.0])  # too early to tell
    assert not find_warnings(
        [4.0] * 40 + [x / 100 for x in steady] + [1.9]
    )  # most of what was learned is still there
    assert find_warnings([4.0] * 40 + [x / 100 for x in steady] + [2.1])
    assert not find_warnings(
        [*steady, *[5.0] * 40], marks={100: {"churn": 0.5}}
    )  # the entries moved: another model
    assert find_warnings([*steady, *[5.0] * 40])


def test_a_new_phase_starts_anew() -> None:
    state, session = WatchRecord(), _still()
    for i in range(60):
        session.phase = i // 30
        assert not watchdog.observe(
            state, session, Step(i + 1, 0.1 if i < 30 else 5.0, 1e-3, 0.1, {"grad_norm": 1.0})
        )


def test_dead_gradients_and_norms_that_are_no_number() -> None:
    (line,) = find_warnings([1.0] * 30, [1.0] * 10 + [0.0] * 20)
    assert line.startswith("The gradient is 0 in the 5 steps up to 15: nothing is learned")
    assert not find_warnings([1.0] * 30, ([0.0] * 4 + [1.0]) * 6)
    (line,) = find_warnings([1.0] * 30, [1.0] * 10 + [math.inf] + [1.0] * 10 + [math.inf] * 9)
    assert line.startswith("The gradient's norm is inf at step 11")


def about(session: Session, kind: Any = "vit") -> Any:
    """Make a stub of a ``Setup`` with a new base."""
    head = ("classifier.weight", "classifier.bias") if kind == "vit" else ()
    return SimpleNamespace(
        session=session,
        base=SimpleNamespace(new_parameters=head),
        fingerprint=fingerprint(contract.tiny(kind), head),
    )


def watched(
    method: Method,
    kind: Any = "vit",
    steps: int = 8,
    harm: Any = None,
    until: int | None = None,
    **begin: Any,
) -> tuple[list[str], list[str]]:
    """Return warnings and suspicions of a run on a tiny model; call ``harm(session)`` after each step."""
    session = contract.begin(method, kind, replace(contract.TRAIN, steps=steps), **begin)
    setup, state, said = about(session, kind), WatchRecord(), list[str]()
    frozen = FrozenState(setup)
    for step in session.steps():
        if harm:
            harm(session)
        said += watchdog.observe(state, session, step)
        state = stored_and_read(state)
        if step.number == until:
            break
    return said, find_suspicions(state, setup, frozen)


def every(schedule: Any) -> Any:
    return Crossing(sparsity=0.9, score="magnitude", schedule=schedule)


HEALTHY: dict[str, Method] = {
    "lora": LoRA(rank=2),
    "shira": SHiRA(sparsity=0.9),
    "rows": SHiRA(sparsity=0.9, grain="row"),
    "model": SHiRA(sparsity=0.99, scope="model"),
    "full": Full(),
    "hft": HFT(),
    "hft2": HFT(rounds=2),
    "bitfit": BitFit(),
    "lt_sft": LTSFT(sparsity=0.9),
    "snell": SNELL(sparsity=0.9),
    "snella": SNELLA(sparsity=0.9, every=2),
    "peft": Peft(),
    "grow": every(Grow(every=2)),
    "ramp": every(Ramp(every=1)),
    "sara": SaRA(sparsity=0.9),
    "sara that keeps most": SaRA(sparsity=0.1),
    "narrow": every(Narrow()),
    "down": every(Ramp(initial=0.2, every=1)),
    "moving": every(DropGrow(every=2)),
    "s2ft": S2FT(),
    "2:4": SHiRA(sparsity=0.5, grain="2:4"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_not_suspected(name: str) -> None:
    assert watched(HEALTHY[name]) == ([], [])
    if name in ("grow", "ramp", "down", "lt_sft"):
        assert watched(HEALTHY[name], until=5) == ([], [])  # ended early, by train.max_seconds


def test_layers_that_rest_are_not_suspected() -> None:
    assert watched(LoRA(rank=2), selector=IST()) == ([], [])
    assert watched(SHiRA(sparsity=0.9), "llama", selector=IST()) == ([], [])


@dataclass(frozen=True)
class Loose(LoRA):
    """Make one delta that is not attached to the model."""

    name: ClassVar[str] = "loose"

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = super().build(model)
        state["loose"] = LowRank((4, 4), 2, 1.0, 0.0)
        return state


def test_a_part_that_does_not_act_is_named() -> None:
    said, found = watched(Loose(rank=2))
    assert found == ["2 of 28 trained parts did not move (first: method.loose.a, which got no gradient)"]
    assert said == [f"{found[0]} in the first 5 steps."]
    assert watched(Loose(rank=2), steps=1) == ([], [])  # one step shows no motion


def test_a_part_with_gradient_that_stands_still_is_named() -> None:
    kept: dict[str, torch.Tensor] = {}

    def hold(session: Session) -> None:
        for name, p in session.states.named_parameters():
            if name.endswith("k_proj.a"):
                p.data.copy_(kept.setdefault(name, p.detach().clone()))

    _, found = watched(LoRA(rank=2), harm=hold)
    assert found == ["2 of 26 trained parts did not move (first: method.vit/layers/0/attention/k_proj.a)"]


def test_a_layer_of_a_sparse_store_that_stands_still_is_named() -> None:
    def hold(session: Session) -> None:
        session.states["method"]["bank"].slice(3).data.zero_()

    _, found = watched(SHiRA(sparsity=0.9), harm=hold)
    assert found == ["1 of 14 trained parts did not move (first: entries of vit.layers.0.attention.o_proj)"]


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=2), SHiRA(sparsity=0.9), SNELL(sparsity=0.9), BitFit(), HFT(), Peft()],
    ids=lambda m: m.name,
)
def test_one_entry_of_the_frozen_base_that_moves_is_found(method: Method) -> None:
    def push(session: Session) -> None:
        if session.number == 3:
            frozen = [
                p
                for n, p in session.model.named_parameters()
                if p.ndim == 2 and not p.requires_grad and "lora" not in n
            ]
            frozen[-1].data[0, 0] += 1e-3

    assert watched(method)[1] == []
    assert watched(method, harm=push)[1] == [
        "frozen weights changed during training: without its parts the model is not the pretrained one"
    ]


def test_statistics_of_batches_that_move_are_found() -> None:
    model = contract.tiny()
    model.vit.register_buffer("running_mean", torch.zeros(3))

    def count(session: Session) -> None:
        session.model.vit.running_mean += 1

    assert watched(LoRA(rank=2), model=model, harm=count)[1] == [
        "1 buffers of the model changed in training (first: vit.running_mean), "
        "and the stored change does not hold them"
    ]


@dataclass(frozen=True)
class Fewer(SHiRA):
    """Train fewer entries, or more, than requested."""

    name: ClassVar[str] = "fewer"
    by: float = 0.5

    def choose(self, *args: Any, **more: Any) -> list[torch.Tensor]:
        return [where[: int(self.by * len(where))] for where in super().choose(*args, **more)]


def test_another_sparsity_than_asked_is_found(tmp_path: Path) -> None:
    asked = sum(s[0] * s[1] - round(0.9 * s[0] * s[1]) for s in [(32, 32)] * 8 + [(48, 32), (32, 48)] * 2)
    (words,) = watched(Fewer(sparsity=0.9))[1]
    count, wanted = int(words.split()[0]), int(words.split()[-1])
    assert wanted == pytest.approx(asked, abs=12)
    assert count == pytest.approx(asked / 2, abs=12)
    session = contract.finish(contract.begin(SHiRA(sparsity=0.9)))
    save_delta(tmp_path / "delta", session.states, {})
    state, setup = WatchRecord(seen=6), about(session)
    assert find_suspicions(state, setup, FrozenState(setup), tmp_path / "delta", 6) == []
    fewer = contract.finish(contract.begin(SHiRA(sparsity=0.95)))
    save_delta(tmp_path / "delta", fewer.states, {})
    (words,) = find_suspicions(state, setup, FrozenState(setup), tmp_path / "delta", 6)
    assert "entries are stored" in words


def test_a_kernel_that_is_not_thresholded_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.core.kernel import Kernel

    monkeypatch.setattr(Kernel, "threshold", lambda self, kernel: kernel.new_zeros(()))
    (words,) = watched(SNELL(sparsity=0.9))[1]
    assert "entries of the change are 0, but" in words


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_norm_that_is_logged_is_that_of_all_gradients(clip: float | None) -> None:
    """The oracle is autograd on the same batch, in a second session."""
    sessions = [contract.begin(LoRA(rank=2), train=replace(contract.TRAIN, clip=clip)) for _ in range(2)]
    step = next(sessions[0].steps())
    sessions[1].start()
    sessions[1]._backward(next(sessions[1].batches.steps(0, 1)))
    grads = [p.grad for p in sessions[1].states.parameters() if p.grad is not None]
    assert step.metrics["grad_norm"] == pytest.approx(
        math.sqrt(sum(float(g.double().square().sum()) for g in grads)), rel=1e-5
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_a_run_is_marked_and_says_why(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the base in ``after_step``, outside of the method's parts."""

    def spill(self: LoRA, run: Any, state: Any) -> None:
        next(iter(patched(run.model).values())).base.bias.data += 0.5
        run.metrics["grad_norm"] = math.inf

    healthy = json.loads((runs("vit", "method=lora", "method.rank=3") / "result.json").read_text())
    assert (healthy["suspect"], healthy["warnings"]) == ([], [])
    monkeypatch.setattr(LoRA, "after_step", spill)
    path = runs("vit", "method=lora", "method.rank=2")
    result = json.loads((path / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["suspect"] == [
        "frozen weights changed during training: without its parts the model is not the pretrained one"
    ]
    assert result["warnings"] == [
        "The gradient's norm is inf at step 1. A smaller optimizer.lr, or train.precision=fp32, may help."
    ]
    log = (path / "log.txt").read_text()
    assert log.count("Warning: this run is suspect: frozen weights changed") == 1
    assert log.count("Warning: The gradient's norm is inf at step 1.") == 1
    lines = describe_result(result, path).splitlines()
    assert sum(line.split()[:1] == ["suspect"] for line in lines) == 1
    assert sum(line.split()[:1] == ["warnings"] for line in lines) == 1
