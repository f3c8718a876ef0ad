"""Compare IRepair's slices with gradients of plain models, and its training with that of the blocks alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from finetune.config import load as config
from finetune.core.inplace import InPlace
from finetune.core.method import Method
from finetune.core.roles import block_of
from finetune.core.selector import Selector
from finetune.data.encode import Tokens
from finetune.errors import ConfigError, RunFailed
from finetune.methods.adapters.lofit import LoFiT
from finetune.methods.baseline.full import Full
from finetune.methods.baseline.head import Head
from finetune.methods.reparam.lora import LoRA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.spiel import SpIEL
from finetune.objectives.repair import Repair
from finetune.objectives.task import Task
from finetune.optim.adamw import AdamW
from finetune.selectors import irepair
from finetune.selectors.irepair import IRepair, Slice, measure_sensitivities
from finetune.testing import contract
from finetune.testing.cases import Case, find_cases
from finetune.training.batches import choose_examples, derive_seed
from finetune.training.session import Session

from ..support import task
from ..support.command import call

LAYERS = 4
DECAYING = AdamW(lr=1e-2, weight_decay=0.1)
SILENT = [{"id": "0", "input_ids": [5], "bytes": 1, "pad": 0}] * 8  # texts without a token to predict


@dataclass(frozen=True)
class OnlyBlocks(Method):
    """Train the parameters of some blocks in place: what a slice that never changes must equal."""

    name: ClassVar[str] = "only_blocks"
    blocks: tuple[int, ...] = tuple(range(LAYERS))

    def build(self, model: nn.Module) -> InPlace:
        names = [name for name, _ in model.named_parameters() if block_of(name) in self.blocks]
        return InPlace(model, names, keep=False)


def gpt2(embeddings: float = 1.0) -> Any:
    """Make a model of four blocks. ``embeddings``: scale of what its first block reads."""
    t: Any = transformers
    torch.manual_seed(7)
    sizes: Any = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": LAYERS, "n_head": 2}
    model = t.GPT2LMHeadModel(
        t.GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(50 * embeddings if name.startswith("w") else 3)
    return model.eval()


def begin(
    method: Method | None = None,
    selector: Selector | None = None,
    objective: Any = None,
    model: Any = None,
    steps: int = 6,
    **train: Any,
) -> Session:
    return contract.begin(
        method or Full(),
        "gpt2",
        train=replace(contract.TRAIN, steps=steps, **train),
        model=model or gpt2(),
        selector=selector or IRepair(),
        optimizer=DECAYING,
        objective=objective or Task(),
    )


def state_of(session: Session) -> Slice:
    state = session.states["selector"]
    assert isinstance(state, Slice)
    return state


def sensitivities(step: Any) -> list[float]:
    return [value for name, value in step.metrics.items() if name.startswith("sensitivity_")]


def holdings(session: Session) -> dict[int, list[Tensor]]:
    """Copy the values in each block (-1: elsewhere) and their moments, found without the selector."""
    found: dict[int, list[Tensor]] = {}
    for name, parameter in session.states.named_parameters():
        state = session.optimizer.state.get(parameter, {})
        zero = torch.zeros_like(parameter)
        tensors = [parameter.detach(), *(state.get(key, zero) for key in ("exp_avg", "exp_avg_sq"))]
        tensors.append(torch.as_tensor(state.get("step", 0.0)))
        found.setdefault(block_of(name.replace("/", ".")), []).extend(t.clone() for t in tensors)
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


@pytest.mark.parametrize("selector", [IRepair(), IRepair(blocks=3), IRepair(by="random")])
def test_only_the_slice_moves(selector: IRepair) -> None:
    """Invariant 1, under weight decay: other blocks keep values, moments and counts of steps to the bit."""
    session, count = begin(selector=selector, objective=Repair(), steps=8), selector.blocks
    before, slices = holdings(session), list[list[int]]()
    for _ in session.steps():
        after, chosen = holdings(session), state_of(session).chosen
        assert len(chosen) == count
        for block, tensors in before.items():
            assert same(tensors, after[block]) == (block not in chosen), block
        slices.append(chosen)
        before = after
    counts = {str(block): sum(block in chosen for chosen in slices) for block in range(LAYERS)}
    assert session.selector.count_selected(state_of(session)) == counts
    assert sum(counts.values()) == 8 * count
    if selector.by == "random":
        assert len({tuple(chosen) for chosen in slices}) > 1


def expect_norms(session: Session, model: nn.Module, step: int) -> list[float]:
    """Return the norms of the gradient on the bad batch of a step, text by text, in float64."""
    data: Any = session.batches.sets["bad"]
    rows = choose_examples(len(data), 8, derive_seed(0, "bad"), step)
    plain: Any = copy.deepcopy(model).double().requires_grad_(True)
    losses, tokens = torch.zeros((), dtype=torch.float64), 0
    for i in rows:
        ids = torch.tensor([data[int(i)]["input_ids"]])
        chances = plain(ids).logits[0, :-1].log_softmax(-1)
        losses = losses - chances.gather(1, ids[0, 1:, None]).sum()
        tokens += ids.shape[1] - 1
    (losses / tokens).backward()
    squares = dict.fromkeys(range(LAYERS), 0.0)
    for name, parameter in plain.named_parameters():
        if block_of(name) >= 0:
            squares[block_of(name)] += float(parameter.grad.square().sum())
    return [square**0.5 for square in squares.values()]


@pytest.mark.parametrize("micro", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_sensitivities_are_gradient_norms_of_the_bad_batch(micro: int | None) -> None:
    """Compare with float64 autograd of a plain model, also after some training."""
    session = begin(objective=Repair(), micro_batch_size=micro, steps=3)
    plain = gpt2()
    for number, step in enumerate(session.steps()):
        norms = expect_norms(session, plain, number)
        assert sensitivities(step) == pytest.approx(norms, rel=1e-4)
        assert state_of(session).chosen == [max(range(LAYERS), key=norms.__getitem__)]
        plain.load_state_dict(session.model.state_dict())


def test_only_bad_data_decides_the_slice() -> None:
    """Invariant 2: other clean or general texts leave the first choice as it is; other bad ones do not."""
    found = {}
    for changed in ("nothing", "train", "general", "bad"):
        session = begin(objective=Repair(), steps=1)
        if changed != "nothing":
            session.batches.sets[changed] = Tokens(contract.examples("gpt2", 21, seed=9))
        (step,) = session.steps()
        found[changed] = sensitivities(step), step.loss
    assert found["nothing"][0] == found["train"][0] == found["general"][0] != found["bad"][0]
    assert found["nothing"][1] == found["bad"][1] != found["train"][1]


@contextmanager
def scale_gradients(session: Session, inner: Any, factor: float, stream: str) -> Iterator[float]:
    with inner(stream) as loss:
        for parameter in session.states.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor
        yield loss


@pytest.mark.parametrize("scale", [1e-30, 1e3])
def test_the_slice_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    """Invariant 3."""
    norms, chosen = [], []
    for factor in (1.0, scale):
        session = begin(selector=IRepair(blocks=2), steps=1)
        session.run.stream_gradients = partial(scale_gradients, session, session.run.stream_gradients, factor)
        (step,) = session.steps()
        norms.append(sensitivities(step))
        chosen.append(state_of(session).chosen)
    assert chosen[0] == chosen[1]
    assert norms[1] == pytest.approx([scale * norm for norm in norms[0]], rel=1e-5)


def test_the_first_slice_does_not_depend_on_the_rate() -> None:
    chosen = []
    for lr in (1e-5, 1.0):
        session = contract.begin(
            Full(), "gpt2", model=gpt2(), selector=IRepair(), optimizer=replace(DECAYING, lr=lr)
        )
        next(session.steps())
        chosen.append(state_of(session).chosen)
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("objective", [pytest.param(Task, marks=pytest.mark.slow), Repair])
def test_all_blocks_are_plain_tuning_of_the_blocks(objective: Callable[[], Any]) -> None:
    """Invariant 5, to the bit and step by step: losses, norms of the whole gradient, and values."""
    models, reported = [], []
    for method, selector in ((Full(), IRepair(blocks=LAYERS)), (OnlyBlocks(), Selector())):
        session = begin(method, selector, objective())
        reported.append([(step.loss, step.metrics["grad_norm"]) for step in session.steps()])
        models.append(session.model)
    assert reported[0] == reported[1]
    contract.same_values(*models)


def test_a_slice_that_stays_is_tuning_of_these_blocks() -> None:
    """Invariant 8, to the bit."""
    fixed = contract.finish(begin(selector=IRepair(blocks=2, every=6)))
    chosen = state_of(fixed).chosen
    assert state_of(fixed).steps.tolist() == [6 * (block in chosen) for block in range(LAYERS)]
    plain = contract.finish(begin(OnlyBlocks(tuple(chosen)), Selector()))
    contract.same_values(fixed.model, plain.model)


@pytest.mark.parametrize("planted", [*(pytest.param(i, marks=pytest.mark.slow) for i in range(3)), 3])
def test_a_planted_error_is_found(planted: int) -> None:
    """Invariant 6: the bad texts are the sound model's own continuations; one block is then disturbed."""
    model = gpt2()
    ids = torch.randint(1, 40, (16, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        generator = torch.Generator().manual_seed(planted)
        for parameter in model.transformer.h[planted].parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    texts = [{"id": str(i), "input_ids": row, "bytes": 12, "pad": 0} for i, row in enumerate(ids.tolist())]
    session = contract.begin(Full(), "gpt2", model=model, selector=IRepair(), optimizer=AdamW(lr=1e-4))
    session.batches.sets["bad"] = Tokens(texts)
    contract.finish(session)
    assert state_of(session).steps[planted] >= 4


@pytest.mark.parametrize("make", [Full, lambda: SHiRA(sparsity=0.9), lambda: LoRA(rank=2)])
def test_a_step_without_gradient_of_bad_data_is_skipped(make: Callable[[], Method]) -> None:
    """Invariant 7: no block is favoured; no value and no moment moves, and the loss is still measured."""
    session = begin(make(), steps=2)
    session.batches.sets["bad"] = Tokens(SILENT)
    session.start()
    before = holdings(session)
    for step in session.steps():
        assert sensitivities(step) == [0.0] * LAYERS
        assert step.metrics["grad_norm"] == 0
        assert step.loss > 1
        assert all(same(tensors, before[block]) for block, tensors in holdings(session).items())
    assert not state_of(session).steps.any()
    assert not session.optimizer.state


def test_training_goes_on_after_a_skipped_step() -> None:
    session = begin(steps=2)
    kept, session.batches.sets["bad"] = session.batches.sets["bad"], Tokens(SILENT)
    steps = session.steps()
    next(steps)
    session.batches.sets["bad"] = kept
    next(steps)
    assert state_of(session).steps.sum() == 1
    assert session.optimizer.state


def test_a_bad_loss_that_is_not_finite_stops_the_run() -> None:
    session = begin(steps=1)
    with torch.no_grad():
        session.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match=r"The loss of streams\.bad is nan at step 1 .* no block can be chos"):
        next(session.steps())
    assert all(parameter.grad is None for parameter in session.states.parameters())


def test_a_choice_that_runs_out_of_memory_is_made_again_in_smaller_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends with the bits of a run whose micro-batch was that small from the start."""
    expected, tries = contract.finish(begin(micro_batch_size=4)), list[int | None]()
    halved = begin()

    def fail_once(state: Slice) -> list[float]:
        tries.append(halved.batches.micro_batch_size)
        if len(tries) == 1:
            raise MemoryError
        return measure_sensitivities(state)

    monkeypatch.setattr(irepair, "measure_sensitivities", fail_once)
    contract.finish(halved)
    assert tries == [None, *[4] * 6]
    contract.same_values(halved.states, expected.states)


def test_entries_that_are_watched_do_not_see_the_bad_data() -> None:
    """SpIEL sums the gradients of a step's own data in every backward pass."""
    session = begin(SpIEL(sparsity=0.9))
    session.start()
    bank: Any = session.states["method"]["bank"]

    def watch(i: int, grad: Any) -> bool:
        raise AssertionError

    bank.watch = watch
    with session.run.stream_gradients("bad"):
        assert bank.values.grad.any()
    assert bank.watch is watch
    assert bank.values.grad is None


def test_what_lies_outside_of_the_blocks_is_frozen_but_the_head_of_a_classifier() -> None:
    session = contract.begin(Full(), selector=IRepair())
    frozen = [name for name, p in session.states.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(block_of(name.replace("/", ".")) == -1 and "head" not in name for name in frozen)
    assert not [name for name in frozen if block_of(name.replace("/", ".")) >= 0]
    head = copy.deepcopy(session.states["head"])
    contract.finish(session)
    with pytest.raises(AssertionError):
        contract.same_values(head, session.states["head"])


def test_random_blocks_need_no_stream() -> None:
    selector = IRepair(blocks=2, by="random")
    assert selector.streams() == ()
    session = begin(selector=selector, steps=10)
    drawn = set()
    for step in session.steps():
        assert len(state_of(session).chosen) == 2
        assert "loss_bad" not in step.metrics
        drawn.add(tuple(state_of(session).chosen))
    assert len(drawn) >= 3
    assert int(state_of(session).steps.sum()) == 20


TRIALS: dict[str, Callable[[], contract.Trial]] = {
    "full": lambda: contract.Trial(Full, "gpt2", choose=IRepair, objective=Repair()),
    "lora every 2": lambda: contract.Trial(
        lambda: LoRA(rank=2, dropout=0.2), choose=lambda: IRepair(every=2)
    ),
    "shira random": lambda: contract.Trial(
        lambda: SHiRA(sparsity=0.9), choose=lambda: IRepair(by="random", every=2)
    ),
}


@pytest.mark.parametrize(
    "make",
    [TRIALS["full"], *(pytest.param(TRIALS[name], marks=pytest.mark.slow) for name in list(TRIALS)[1:])],
    ids=TRIALS,
)
def test_resumes_to_the_bit_and_repeats_itself(make: Callable[[], contract.Trial]) -> None:
    trial = make()
    contract.check_resume(trial)
    contract.check_same_seed(trial)


CASES = find_cases(Path(__file__).parents[1] / "methods")
REFUSED = ("head", "peft", "lofit")  # train nothing in a block, or what is tied to none


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])
def test_every_method_is_selected_from_or_refused(case: Case) -> None:
    train = replace(contract.TRAIN, steps=3)
    begin = partial(contract.begin, case.make(), train=train, optimizer=case.optimizer, selector=IRepair())
    if case.name.split()[0] in REFUSED:
        with pytest.raises(ConfigError, match="selector=irepair "):
            begin()
        return
    session = contract.finish(begin())
    assert state_of(session).steps.any()  # not in every step: SaRA may have no entry to train in one


@pytest.mark.parametrize(
    ("method", "selector", "words"),
    [
        (Head(), IRepair(), "this method trains nothing in one"),
        (LoFiT(share=0.5), IRepair(), "is not tied to a block"),
        (Full(), IRepair(blocks=3), "selector.blocks=3 is more than the 2 blocks in which"),
    ],
)
def test_methods_without_such_blocks_are_refused(method: Method, selector: Selector, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        contract.begin(method, selector=selector)


BAD = ["streams.bad=jsonl", "streams.bad.path=bad.jsonl"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["selector=irepair"], "selector=irepair needs the data stream bad, and streams.bad is not set."),
        (BAD, "streams.bad=jsonl has no effect with objective=task, which uses no data stream."),
        (["selector=irepair", "selector.by=random", *BAD], "streams.bad=jsonl has no effect with"),
        (
            ["selector=irepair", *BAD, "streams.retain=digits"],
            "streams.retain=digits has no effect with objective=task and selector=irepair, which use only",
        ),
    ],
)
def test_streams_are_asked_for_and_refused(words: list[str], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(["method=full", *words])
    (fault,) = caught.value.faults
    assert wanted in fault


def test_a_run_reports_how_often_each_block_was_chosen(tmp_path: Path) -> None:
    task.make(tmp_path)
    images = f"path={tmp_path / 'images'}"
    words = ["model=hf", f"model.path={tmp_path / 'model'}", "dataset=imagefolder", f"dataset.{images}"]
    words += ["streams.bad=imagefolder", f"streams.bad.{images}", "selector=irepair", "method=full"]
    made = call("train", *words, "train.steps=3", "train.device=cpu", "name=t", "run=r", folder=tmp_path)
    assert made.code == 0, made.err
    result = json.loads((tmp_path / "outputs/t/r/result.json").read_text())
    assert sum(result["selected_steps"].values()) == 3
    assert result["params"]["trained"] < result["params"]["adapted"]
