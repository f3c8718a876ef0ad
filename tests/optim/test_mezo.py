"""MeZO and Sparse-MeZO against closed formulas: gradients of known functions, and steps made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.config.load import load
from finetune.core import seeded
from finetune.core.sparse.bank import Bank
from finetune.errors import ConfigError, RunFailed
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.amt import AMT
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.peft import Peft
from finetune.methods.sparse.hft import HFT
from finetune.methods.sparse.s2ft import S2FT
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.sparse import Crossing
from finetune.optim.mezo import Direction, MeZO, find_threshold, pack_bits, unpack_bits
from finetune.selectors.ist import IST
from finetune.storage.progress import WatchRecord
from finetune.testing import contract
from finetune.testing.cases import find_cases
from finetune.training.batch_size import find_batch_size
from finetune.training.session import NotFinite, Session
from finetune.training.watchdog import observe

METHODS = Path(__file__).parents[1] / "methods"
PUBLISHED = {  # princeton-nlp/MeZO, README: RoBERTa-large, all weights
    "lr": 1e-6,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0.0,
    "eps": 1e-3,
    "sparsity": 0.0,
    "mask": "smallest",
}


def noise(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Given:
    """Parameters, and a run whose steps move them."""

    def __init__(self, optimizer: MeZO, weight_decay: float = 0.0, seed: int = 3, **values: Tensor) -> None:
        self.optimizer = optimizer
        self.parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        self.states = nn.ParameterDict(self.parameters)
        groups = [{"params": list(self.states.values()), "weight_decay": weight_decay}]
        self.metrics: dict[str, float] = {}
        self.run: Any = SimpleNamespace(
            states=self.states,
            optimizer=optimizer.make(groups, self.states),
            seed=seed,
            step=0,
            log=lambda **metrics: self.metrics.update(metrics),
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[name].data

    def direction(self, name: str) -> Tensor:
        """Return the direction of a tensor in the current step, drawn as a whole."""
        key = seeded.seed_for(self.run.seed, name)
        return seeded.normal(self[name].shape, key, self.run.step, dtype=torch.float64)

    def step(self, loss: Callable[[], float]) -> float:
        """Make a step, and return the slope along its direction."""
        self.optimizer.step(self.run, loss)
        self.run.step += 1
        return self.metrics["projected_gradient"]


def test_the_defaults_are_the_published_ones() -> None:
    mezo = load(["optimizer=mezo", "method=sara"])  # whose file has a rate and a decay for AdamW
    assert mezo.optimizer == MeZO()
    assert {name: getattr(mezo.optimizer, name) for name in PUBLISHED} == PUBLISHED
    assert mezo.train.clip is None
    sparse = load(["optimizer=sparse_mezo", "method=sara"])
    assert sparse.optimizer == replace(mezo.optimizer, sparsity=0.8)
    assert sparse.train.clip is None


# MeZO


def test_values_are_restored_to_rounding() -> None:
    start = noise(300, 40, std=0.02).float()
    given = Given(MeZO(lr=1.0), w=start)
    seen = []

    def loss() -> float:
        seen.append(given["w"].clone())
        return 1.0

    assert given.step(loss) == 0
    assert float((given["w"] - start).abs().max()) < 1e-7
    given.run.step = 0
    z = given.direction("w").float()
    torch.testing.assert_close(seen[0], start + 1e-3 * z, atol=1e-8, rtol=0)
    torch.testing.assert_close(seen[1], start - 1e-3 * z, atol=1e-8, rtol=0)
    for _ in range(100):
        given.step(loss)
    drift = float((given["w"] - start).std() / start.std())
    assert drift < 1e-6, "100 steps that move nothing"


def test_the_step_is_along_the_direction() -> None:
    given = Given(MeZO(lr=0.5), w=noise(30, 4))
    start = given["w"].clone()
    target = noise(30, 4, seed=1)
    slope = given.step(lambda: float((given["w"] * target).sum()))
    given.run.step = 0
    z = given.direction("w")
    torch.testing.assert_close(given["w"] - start, -0.5 * slope * z, atol=1e-12, rtol=1e-9)
    assert slope == pytest.approx(float((target * z).sum()), rel=1e-9)  # a linear function has no error


@pytest.mark.parametrize("eps", [1e-3, 0.1, 3.0])
def test_the_slope_of_a_quadratic_function_is_exact(eps: float) -> None:
    matrix = noise(7, 7)
    given = Given(MeZO(lr=1e-9, eps=eps), x=noise(7, seed=2))
    x, z = given["x"].clone(), given.direction("x")
    slope = given.step(lambda: float(given["x"] @ matrix @ given["x"]))
    assert slope == pytest.approx(float((matrix + matrix.T) @ x @ z), rel=1e-8)


def test_the_error_on_a_cubic_function_is_of_second_order() -> None:
    errors = []
    for eps in (0.1, 0.05):
        given = Given(MeZO(lr=1e-9, eps=eps), x=noise(7))
        x, z = given["x"].clone(), given.direction("x")
        slope = given.step(lambda given=given: float(given["x"].pow(3).sum()))
        errors.append(slope - float((3 * x**2 * z).sum()))
        assert errors[-1] == pytest.approx(eps**2 * float(z.pow(3).sum()), rel=1e-6)
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_mean_over_directions_is_the_gradient(sparsity: float) -> None:
    start, matrix, draws = noise(3, 2), noise(6, 6), 200
    given = Given(MeZO(lr=1.0, sparsity=sparsity), x=start)
    gradient = ((matrix + matrix.T) @ start.view(-1)).view(3, 2)
    if sparsity:
        gradient = gradient * (start.abs() <= start.abs().median())
    moves = []
    for _ in range(draws):
        given["x"].copy_(start)
        given.step(lambda: float(given["x"].view(-1) @ matrix @ given["x"].view(-1)))
        moves.append(start - given["x"])
    found = torch.stack(moves)
    error = found.std(0) / math.sqrt(draws)
    assert bool(((found.mean(0) - gradient).abs() <= 3 * error + 1e-12).all())


def test_weight_decay_is_part_of_the_step() -> None:
    given = Given(MeZO(lr=0.5), weight_decay=0.1, w=noise(5, 4))
    start = given["w"].clone()
    given.step(lambda: 2.0)
    torch.testing.assert_close(given["w"], start * (1 - 0.5 * 0.1), atol=1e-12, rtol=1e-9)


def test_other_tensors_do_not_change_a_direction() -> None:
    """Each tensor has a stream of its own, unlike one stream that is cut into tensors."""
    both = Given(MeZO(lr=1.0), a=noise(4, 3), b=noise(5, 2))
    alone = Given(MeZO(lr=1.0), b=noise(5, 2))
    for given in (both, alone):
        given.step(lambda given=given: float(given["b"].sum()))
    torch.testing.assert_close(both["b"], alone["b"], atol=1e-12, rtol=1e-9)
    frozen = Given(MeZO(lr=1.0), a=noise(4, 3), b=noise(5, 2))
    frozen.parameters["a"].requires_grad_(False)
    frozen.step(lambda: float(frozen["b"].sum()))
    assert torch.equal(frozen["a"], noise(4, 3))
    torch.testing.assert_close(frozen["b"], alone["b"], atol=1e-12, rtol=1e-9)


def test_an_error_in_the_second_evaluation_leaves_the_values() -> None:
    given = Given(MeZO(lr=1.0), w=noise(9, 4, std=0.02).float())
    start, calls = given["w"].clone(), []

    def loss() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise NotFinite(1, math.nan, [])
        return 0.0

    with pytest.raises(NotFinite):
        given.step(loss)
    assert float((given["w"] - start).abs().max()) < 1e-7


class Sizes(TorchDispatchMode):
    """Record the largest number of elements of any new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("optimizer", [MeZO(), MeZO(sparsity=0.5, mask="random")], ids=["dense", "sparse"])
def test_no_second_tensor_of_a_parameter_s_size_is_made(
    optimizer: MeZO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(seeded.CHUNK, "cpu", 64)
    given = Given(optimizer, w=torch.ones(20, 20))
    with Sizes() as sizes:
        given.step(lambda: 0.0)
    assert 0 < sizes.largest <= 128


# In a session


@dataclass(frozen=True)
class Penalized(LoRA):
    """LoRA with a penalty on its factors."""

    def loss(self, run: Any, state: Any, batch: Any) -> Tensor:
        total = torch.zeros(())
        for parameter in state.parameters():
            total = total + parameter.square().sum()
        return 0.1 * total


def begin(method: Any, optimizer: MeZO | None = None, **more: Any) -> Session:
    train = replace(contract.TRAIN, **{k: v for k, v in more.items() if k != "selector"})
    optimizer = optimizer or MeZO(lr=1e-3)
    return contract.begin(method, train=train, optimizer=optimizer, selector=more.get("selector"))


def test_a_step_runs_two_forward_passes_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", None)
    session = begin(LoRA(rank=2, dropout=0.5))
    outputs: list[Any] = []
    session.model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    modes: list[bool] = []
    session.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    for _ in session.steps():
        assert all(parameter.grad is None for parameter in session.tuned.parameters())
    assert len(outputs) == 2 * contract.STEPS
    assert not any(output.requires_grad for output in outputs)
    assert not any(modes), "dropout is off"


def test_the_loss_is_that_of_the_batch_with_the_penalty() -> None:
    session = begin(Penalized(rank=2))
    session.start()
    start = {name: p.detach().clone() for name, p in session.states.named_parameters()}
    step = next(session.steps())
    totals, losses = [], []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in session.states.named_parameters():
                z = seeded.normal(p.shape, seeded.seed_for(0, name), 0)
                p.copy_(start[name] + sign * 1e-3 * z)
        loss = float(session.compute.mean_loss(session.run.batch))
        penalty = 0.1 * sum(float(p.detach().square().sum()) for p in session.states["method"].parameters())
        losses.append(loss)
        totals.append(loss + penalty)
    assert step.loss == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert step.metrics["projected_gradient"] == pytest.approx((totals[0] - totals[1]) / 2e-3, abs=2e-3)
    assert "grad_norm" not in step.metrics


def test_a_run_can_be_rebuilt_from_its_metrics() -> None:
    session = begin(LoRA(rank=2), MeZO(lr=1e-3, schedule="linear", warmup=0.5))
    session.start()
    values = {name: p.detach().clone().view(-1) for name, p in session.states.named_parameters()}
    log = [(step.metrics["projected_gradient"], step.lr) for step in session.steps()]
    assert len({lr for _, lr in log}) > 2
    for step, (slope, lr) in enumerate(log):
        for name, value in values.items():
            direction = Direction(value, seeded.seed_for(session.run.seed, name), step, eps=1e-3, lr=lr)
            direction.move_to(1)
            direction.move_to(-1)
            direction.finish(slope)
    for name, parameter in session.states.named_parameters():
        assert torch.equal(parameter.detach().view(-1), values[name]), name


def test_room_for_more_entries_of_a_bank_stays_zero() -> None:
    session = begin(SHiRA(sparsity=0.9))
    session.start()
    bank = next(module for module in session.states.modules() if isinstance(module, Bank))
    index = [bank.positions(i)[: len(bank.positions(i)) // 2] for i in range(len(bank.sizes))]
    bank.revise(index, {}, "base")
    contract.finish(session)
    assert bank.values[: bank.active].all()
    assert not bank.values[bank.active :].any()


@pytest.mark.parametrize(
    ("method", "selector"), [(HFT(), None), (LoRA(rank=2), IST(every=2)), (SHiRA(sparsity=0.9), IST(every=2))]
)
def test_what_is_frozen_in_a_step_does_not_move(method: Any, selector: Any) -> None:
    session = begin(method, selector=selector)
    moved: list[int] = []
    real = session.recipe.optimizer.step
    before: dict[str, Tensor] = {}

    def step(*args: Any) -> None:
        before.update({n: p.detach().clone() for n, p in session.states.named_parameters()})
        frozen.update(n for n, p in session.states.named_parameters() if not p.requires_grad)
        real(*args)

    frozen: set[str] = set()
    object.__setattr__(session.recipe.optimizer, "step", step)
    for _ in session.steps():
        for name, parameter in session.states.named_parameters():
            if name in frozen:
                assert torch.equal(parameter, before[name]), name
            elif not torch.equal(parameter, before[name]):
                moved.append(1)
        frozen.clear()
    assert moved


@pytest.mark.parametrize("optimizer", [MeZO(lr=1e-3), MeZO(lr=1e-3, sparsity=0.8)], ids=["dense", "sparse"])
def test_a_step_that_runs_out_of_memory_ends_as_one_with_the_smaller_micro_batch(optimizer: MeZO) -> None:
    session = begin(Full(), optimizer, steps=2)
    passes: list[int] = []

    def fail(module: nn.Module, args: Any, kwargs: dict[str, Tensor], output: Any) -> None:
        passes.append(len(kwargs["pixel_values"]))
        if passes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    session.model.register_forward_hook(fail, with_kwargs=True)
    losses = [step.loss for step in session.steps()]
    small = begin(Full(), optimizer, steps=2, micro_batch_size=4)
    assert losses == [step.loss for step in small.steps()]
    contract.same_session(session, small)
    assert session.memory.halvings == [{"step": 1, "from": 8, "to": 4}]
    assert passes[0] > 4


def test_memory_that_the_random_numbers_lack_is_the_end_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(LoRA(rank=2))
    session.start()

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(seeded, "draw_normal", fail)
    with pytest.raises(RunFailed, match="Memory ran out in the optimizer, at step 1"):
        next(session.steps())


def test_a_loss_that_is_not_finite_leaves_the_values() -> None:
    session = begin(LoRA(rank=2))
    session.start()
    start = {name: p.detach().clone() for name, p in session.states.named_parameters()}
    session.model.classifier.register_forward_hook(lambda module, args, output: output * math.nan)
    with pytest.raises(NotFinite, match="The loss is nan at step 1"):
        next(session.steps())
    for name, parameter in session.states.named_parameters():
        assert float((parameter.detach() - start[name]).abs().max()) < 1e-7


def test_the_batch_size_is_found_by_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", None)
    session = begin(LoRA(rank=2), batch_size="auto")
    find_batch_size(session)
    assert session.batches.batch_size == 21


def test_the_watchdog_does_not_miss_gradients() -> None:
    session = begin(LoRA(rank=2), MeZO(lr=1e-30))
    record, warnings = WatchRecord(), []
    for step in session.steps():
        for parameter in session.states.parameters():
            with torch.no_grad():
                parameter.copy_(torch.zeros_like(parameter))
        warnings += observe(record, session, step)
    assert len(warnings) == 1
    assert "did not move" in warnings[0]
    assert "gradient" not in warnings[0]


# Together with other settings

READ_GRADIENTS = {"amt", "id3", "lora_ga", "snella", "spiel", "spt"}
CASES = find_cases(METHODS)


def test_faults_of_all_sections_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load(["optimizer=mezo", "method=amt", "train.clip=2", "objective.label_smoothing=0.1"])
    assert list(caught.value.faults) == [
        "method=amt reads gradients with these settings, and optimizer=mezo computes none. Choose "
        "optimizer=adamw, or settings of the method that read no gradient.",
        "train.clip=2 has no effect with optimizer=mezo, which computes no gradient. Set train.clip=null.",
    ]
    assert load(["optimizer=mezo", "method=amt", "method.gdr=0"]).method.gdr == 0


def test_methods_say_whether_they_read_gradients() -> None:
    found = {case.method for case in CASES if type(case.make())().reads_gradients}
    assert found == READ_GRADIENTS
    for scored in ("gradient", "sensitivity"):
        assert Crossing(sparsity=0.9, score=scored).reads_gradients
    assert not Crossing(sparsity=0.9, score="magnitude").reads_gradients
    assert Peft(type="ADALORA").reads_gradients
    assert not Peft(type="LORA").reads_gradients
    assert not AMT(gdr=0.0).reads_gradients
    assert S2FT(criterion="gradient").reads_gradients
    assert not S2FT(criterion="activation").reads_gradients


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_methods_that_read_no_gradient_run_without_any(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = case.make()
    if any(phase.method.reads_gradients for phase in method.phases()):
        return
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    train = replace(contract.TRAIN, steps=2)  # a step of each phase
    session = contract.begin(method, case.kinds[0], train, optimizer=MeZO(lr=1e-3))
    assert len(list(session.steps())) == 2


def test_sparsity_without_a_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sparsity=0.5 has no effect: the method trains no matrix"):
        Given(MeZO(sparsity=0.5), b=torch.zeros(4))


def test_a_mask_without_sparsity_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.mask=random has no effect with optimizer.sparsity=0"):
        load(["optimizer=mezo", "method=full", "optimizer.mask=random"])


# Sparse-MeZO


def test_a_threshold_above_all_values_gives_mezo_to_the_bit() -> None:
    dense, sparse = (Given(MeZO(lr=0.1, sparsity=s), w=noise(30, 7).float()) for s in (0.0, 1e-9))
    for given in (dense, sparse):
        given.step(lambda given=given: float(given["w"].square().sum()))
    state = sparse.run.optimizer.state[sparse.parameters["w"]]
    assert state["threshold"] == noise(30, 7).float().abs().max()
    state["threshold"] = torch.tensor(1e9)  # so that no entry leaves the mask
    for given in (dense, sparse):
        for _ in range(4):
            given.step(lambda given=given: float(given["w"].square().sum()))
    assert torch.equal(dense["w"], sparse["w"])


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8, 0.999])
def test_the_share_of_selected_entries(sparsity: float) -> None:
    w = noise(37, 11).float()
    threshold = find_threshold(w, sparsity)
    selected = int((w.abs() <= threshold).sum())
    assert selected in (max(1, math.floor((1 - sparsity) * 407)), math.ceil((1 - sparsity) * 407))


def test_magnitudes_count_and_not_values() -> None:
    """Values below the threshold include every large negative one, which must stay."""
    given = Given(MeZO(lr=1.0, sparsity=0.5), w=torch.tensor([[-3.0, 0.1], [2.0, -0.2]]))
    given.step(lambda: float(given["w"].sum()))
    moved = given["w"] != torch.tensor([[-3.0, 0.1], [2.0, -0.2]])
    assert moved.tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("mask", ["smallest", "random"])
def test_only_selected_entries_move_along_the_masked_direction(mask: Any) -> None:
    w = noise(200, 50)
    given = Given(MeZO(lr=0.3, sparsity=0.8, mask=mask), weight_decay=0.1, w=w)
    z = given.direction("w")
    slope = given.step(lambda: float(given["w"].square().sum()))
    m = given["w"] != w
    assert float(m.double().mean()) == pytest.approx(0.2, abs=0.02)
    if mask == "smallest":
        assert torch.equal(m, w.abs() <= w.abs().view(-1).kthvalue(2000).values)
    assert slope == pytest.approx(float((2 * w * m * z).sum()), rel=1e-6)
    wanted = -0.3 * m.double() * (slope * z + 0.1 * w)
    torch.testing.assert_close(given["w"] - w, wanted, atol=1e-10, rtol=1e-9)


def test_one_mask_serves_both_evaluations_and_the_step() -> None:
    """With a mask of the perturbed values about 16 % of the selected entries would not be restored."""
    w = noise(300, 40, std=0.02).float()
    given = Given(MeZO(lr=1.0, sparsity=0.8), w=w)
    m, z = w.abs() <= find_threshold(w, 0.8), given.direction("w").float()
    seen: list[Tensor] = []

    def loss() -> float:
        seen.append(given["w"].clone())
        return 1.0

    given.step(loss)
    assert float((given["w"] - w).abs().max()) < 1e-7
    for sign, values in zip((1, -1), seen, strict=True):  # what a perturbation in the forward pass would use
        torch.testing.assert_close(values, w + sign * 1e-3 * (m * z), atol=1e-8, rtol=0)


def test_entries_leave_the_mask_and_never_enter() -> None:
    given = Given(MeZO(lr=0.02, sparsity=0.5), w=noise(40, 10))
    target, threshold = noise(40, 10, seed=1, std=3.0), find_threshold(given["w"], 0.5)
    selected = [given["w"].abs() <= threshold]
    for _ in range(30):
        given.step(lambda: float((given["w"] - target).square().mean()))
        selected.append(given["w"].abs() <= threshold)
    for before, after in pairwise(selected):
        assert not (after & ~before).any()
    assert selected[-1].sum() < selected[0].sum()
    assert given.run.optimizer.state[given.parameters["w"]]["threshold"] == threshold


def test_a_random_mask_stays_the_same() -> None:
    w = noise(40, 10)
    given = Given(MeZO(lr=0.1, sparsity=0.7, mask="random"), w=w)
    masks = []
    for _ in range(3):
        before = given["w"].clone()
        given.step(lambda: float(given["w"].sum()))
        masks.append(given["w"] != before)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_vectors_and_constant_tensors_move_as_a_whole() -> None:
    values = {"vector": noise(9), "zeros": torch.zeros(4, 3).double(), "matrix": noise(5, 4)}
    given = Given(MeZO(lr=1.0, sparsity=0.8), **values)
    for _ in range(2):  # a second step of the tensor that was constant
        before = {name: given[name].clone() for name in values}
        given.step(lambda: sum(float(given[name].sum()) for name in values))
        moved = {name: int((given[name] != before[name]).sum()) for name in values}
        assert moved["vector"] == 9
        assert moved["zeros"] == 12
        assert moved["matrix"] <= 4


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_are_packed_as_numpy_packs_them(count: int) -> None:
    flags = noise(count) > 0
    packed = pack_bits(flags)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(flags.numpy(), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, count), flags)
