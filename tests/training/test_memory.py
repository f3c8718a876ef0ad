"""Check that a run which runs out of memory ends as one that was started with the smaller micro-batch.

The shortage is injected. The oracle is that other run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.config.load import load
from finetune.config.settings import Config
from finetune.core.method import Method
from finetune.core.selector import Selector
from finetune.core.sparse import bank, choosing
from finetune.data.encode import collate
from finetune.errors import ConfigError, RunFailed
from finetune.methods.reparam.amt import AMT
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.snell import SNELL
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.methods.sparse.sara import SaRA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.sparse import Crossing
from finetune.methods.sparse.spiel import SpIEL
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.redraw import Redraw
from finetune.selectors.ist import IST
from finetune.system.signals import Interrupted, Signals
from finetune.testing import contract
from finetune.training import batch_size, run
from finetune.training.batch_size import find_batch_size
from finetune.training.batches import Batches
from finetune.training.evaluate import evaluate
from finetune.training.session import Session

from ..support import task
from ..support.same_run import differences

NO_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8 bytes."
    ),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "numpy": MemoryError("Unable to allocate 8.00 GiB for an array"),
}
METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(rank=2),
    "snell": lambda: SNELL(rank=4, sparsity=0.5, dropout=0.3, drop_path=0.3),  # draws in every pass
    "spiel": lambda: SpIEL(sparsity=0.9, schedule=DropGrow(every=3), window=2),  # watches the gradients
    "amt": AMT,  # looks at the batch once more after the backward pass
    "sara": lambda: SaRA(sparsity=0.9, penalty=0.1),
    "lt_sft": lambda: LTSFT(sparsity=0.9),  # two phases
    "gradient": lambda: Crossing(
        sparsity=0.9, score="gradient", schedule=DropGrow(every=2)
    ),  # looks at batches before it starts, and before steps
    "random": lambda: Crossing(sparsity=0.9, schedule=Redraw(every=2)),
}


class Short:
    """Let passes of more than ``most`` examples through ``session``'s model run out of memory.

    ``where``: in the forward pass, the backward pass, or its ``middle``. The first ``spared`` passes succeed.
    """

    def __init__(
        self,
        session: Session,
        most: int,
        where: str = "forward",
        error: Exception = NO_MEMORY["cuda"],
        spared: int = 0,
    ) -> None:
        self.most, self.where, self.error, self.spared, self.failed = most, where, error, spared, 0
        session.model.register_forward_hook(self, with_kwargs=True)
        if where == "middle":  # of the backward pass: some layers have given their gradients
            session.model.vit.layers[0].register_forward_hook(self._between)

    def _between(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and len(hidden) > self.most and self.spared <= 0:
            hidden.register_hook(self._fail)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Tensor], output: Any) -> None:
        self.spared -= 1
        if len(next(iter(kwargs.values()))) <= self.most or self.spared >= 0:
            return
        if self.where == "forward":
            self._fail()
        elif self.where == "backward" and output.logits.requires_grad:
            output.logits.register_hook(self._fail)

    def _fail(self, *_: Tensor) -> None:
        self.failed += 1
        raise self.error


def begin(
    method: Method, micro: int | None = None, selector: Selector | None = None, **train: Any
) -> Session:
    return contract.begin(
        method, train=replace(contract.TRAIN, micro_batch_size=micro, **train), selector=selector
    )


def saved(session: Session) -> dict[str, Any]:
    """Copy a session's state, which training changes in place."""
    return copy.deepcopy(session.state_dict())


def losses(session: Session) -> list[float]:
    return [step.loss for step in session.steps()]


@pytest.mark.parametrize(("name", "where"), list(zip(METHODS, cycle(["forward", "backward"]), strict=False)))
def test_it_ends_as_a_run_that_was_started_with_the_smaller_micro_batch(name: str, where: str) -> None:
    session = begin(METHODS[name]())
    Short(session, 4, where)
    found = losses(session)
    told = begin(METHODS[name](), micro=4)
    assert found == losses(told)
    contract.same_session(session, told)
    assert session.memory.halvings == [{"step": 1, "from": 8, "to": 4}]


@pytest.mark.parametrize("method", [lambda: LoRA(rank=2), lambda: SHiRA(sparsity=0.9)], ids=["lora", "shira"])
def test_selectors_draw_what_they_would_have_drawn(method: Callable[[], Method]) -> None:
    session = begin(method(), selector=IST(every=2))
    Short(session, 2)
    found = losses(session)
    told = begin(method(), micro=2, selector=IST(every=2))
    assert found == losses(told)
    contract.same_session(session, told)
    assert session.memory.halvings == [{"step": 1, "from": 8, "to": 4}, {"step": 1, "from": 4, "to": 2}]


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_every_way_of_saying_it(error: Exception) -> None:
    session = begin(LoRA(rank=2), steps=1)
    Short(session, 4, error=error)
    assert len(losses(session)) == 1
    assert session.memory.halvings == [{"step": 1, "from": 8, "to": 4}]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")],
    ids=["shapes", "value"],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    session = begin(LoRA(rank=2))
    Short(session, 4, error=error)
    with pytest.raises(type(error)) as raised:
        losses(session)
    assert raised.value is error
    assert not session.memory.halvings


@pytest.mark.parametrize("name", ["spiel", "snell"])
def test_a_later_step_continues_from_the_state_before_it(name: str) -> None:
    """The oracle resumes from an undisturbed session's third step with the smaller micro-batch."""
    whole = begin(METHODS[name]())
    steps = whole.steps()
    before = [next(steps).loss for _ in range(3)]
    state = saved(whole)
    told = begin(METHODS[name](), micro=4)
    told.load_state_dict(state)
    after = losses(told)
    session = begin(METHODS[name]())
    Short(session, 4, "middle", spared=3)
    assert losses(session) == before + after
    contract.same_session(session, told)
    assert [event["step"] for event in session.memory.halvings] == [4]


def test_the_lines_that_are_said_and_what_is_kept() -> None:
    session, said = begin(LoRA(rank=2), steps=1), list[str]()
    session.memory.say = said.append
    Short(session, 3)
    contract.finish(session)
    assert said == [
        f"Memory ran out at step 1: passes of {after} examples instead of {before} from now on; "
        "batch and loss are the same."
        for before, after in ((8, 4), (4, 2))
    ]
    events = [{"step": 1, "from": 8, "to": 4}, {"step": 1, "from": 4, "to": 2}]
    assert session.memory.record().to_json() == {
        "batch_size": 8,
        "micro_batch_size": 2,
        "out_of_memory": events,
    }


def test_one_example_at_a_time_is_the_end_with_advice() -> None:
    session = begin(LoRA(rank=2))
    Short(session, 0)
    with pytest.raises(RunFailed, match="Memory ran out at step 1 with one example at a time"):
        contract.finish(session)
    assert [event["to"] for event in session.memory.halvings] == [4, 2, 1]


def test_memory_that_the_optimizer_lacks_is_the_end_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(LoRA(rank=2))

    def step(*_: Any) -> None:
        raise NO_MEMORY["cuda"]

    monkeypatch.setattr(session.optimizer.optimizer, "step", step)
    with pytest.raises(RunFailed, match="Memory ran out in the optimizer, at step 1"):
        contract.finish(session)


@pytest.mark.parametrize("place", ["reading", "writing", "restoring"])
def test_the_base_stays_whole_where_memory_is_too_short_to_put_entries_in_or_back(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out once, at the worst moments.

    These are: while the originals are read, the changed entries are written, or the originals are restored.
    """
    session, told = begin(SHiRA(sparsity=0.9)), begin(SHiRA(sparsity=0.9), micro=4)
    steps, oracle = session.steps(), told.steps()
    next(steps)
    told.load_state_dict(saved(session))
    name, calls = ("read" if place == "reading" else "write_"), [0]
    real = getattr(bank, name)

    def fails_once(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == (
            6 if place == "restoring" else 5
        ):  # the third layer: it is written, and then restored
            raise NO_MEMORY["cuda"]
        return real(*given)

    monkeypatch.setattr(bank, name, fails_once)
    assert [step.loss for step in steps] == [step.loss for step in oracle]
    assert session.memory.halvings == [{"step": 2, "from": 8, "to": 4}]
    contract.same_session(session, told)
    monkeypatch.undo()
    from finetune.core.attach import detach

    detach(session.model, session.states)
    contract.same_values(session.model, contract.tiny())


def test_a_score_that_runs_out_in_the_middle_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session, told = begin(METHODS["gradient"]()), begin(METHODS["gradient"](), micro=4)
    real, calls = choosing.scan_scores, [0]

    def scan(*given: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            torch.rand(3, generator=session.run.generator)
            torch.rand(3)
            raise NO_MEMORY["cuda"]
        real(*given)

    monkeypatch.setattr(choosing, "scan_scores", scan)
    assert losses(session) == losses(told)
    contract.same_session(session, told)


@pytest.mark.parametrize("late", [False, True])
def test_entries_that_moved_by_half_are_not_moved_again(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(METHODS["random"]())
    steps = session.steps()
    next(steps), next(steps)
    store = session.states["method"]["bank"]
    real = store._set_positions

    def move(index: list[Tensor]) -> None:
        if late:
            real(index)
        raise NO_MEMORY["cuda"]

    monkeypatch.setattr(store, "_set_positions", move)
    with pytest.raises(
        RunFailed,
        match="Memory ran out at step 3 while other entries were being chosen for training, and this step",
    ):
        next(steps)


# train.batch_size=auto


@pytest.mark.parametrize(("most", "found"), [(1, 1), (3, 2), (4, 4), (16, 16), (21, 21), (100, 21)])
def test_the_largest_batch_that_fits(most: int, found: int) -> None:
    session = begin(LoRA(rank=2), batch_size="auto")
    Short(session, most, "backward")
    find_batch_size(session)
    assert session.batches.batch_size == found
    assert session.memory.record().to_json() == {
        "batch_size": found,
        "micro_batch_size": None,
        "out_of_memory": [],
    }


def test_nothing_fits() -> None:
    session = begin(LoRA(rank=2), batch_size="auto")
    Short(session, 0)
    with pytest.raises(RunFailed, match="not even one example fits"):
        find_batch_size(session)


@pytest.mark.parametrize("name", ["gradient", "lt_sft", "snell"])
def test_a_run_of_a_found_batch_size_is_that_of_the_same_size_given(name: str) -> None:
    session = begin(METHODS[name](), batch_size="auto")
    Short(session, 4)
    find_batch_size(session)
    found = losses(session)
    told = begin(METHODS[name](), batch_size=4)
    assert found == losses(told)
    contract.same_session(session, told)


def test_the_longest_examples_are_tried() -> None:
    items = contract.examples("llama")
    data: Any = items  # a list serves as a data set
    batch = Batches(data, "auto", None, 0).longest(3)
    lengths = sorted((len(item["input_ids"]) for item in items), reverse=True)
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths[:3]


def test_on_the_cpu_it_stops_where_the_next_might_take_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    session, said = begin(LoRA(rank=2), batch_size="auto"), list[str]()
    session.memory.say = said.append
    used = iter([1000, 2000, 4000])
    monkeypatch.setattr(batch_size, "resident_bytes", lambda: 0)
    monkeypatch.setattr(batch_size, "peak_memory", lambda: (next(used), "process_rss"))
    monkeypatch.setattr(batch_size, "_free_bytes", lambda: 7999)
    find_batch_size(session)
    assert session.batches.batch_size == 4
    assert said[0].startswith("train.batch_size=auto: 4 examples, found in ")


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train.micro_batch_size=2 has no effect with train.batch_size=auto"
    ):
        load(["train.batch_size=auto", "train.micro_batch_size=2"])
    with pytest.raises(ConfigError, match=r"train.batch_size='most'.* should be .*'auto'"):
        load(["train.batch_size=most"])


# evaluation


def test_an_evaluation_that_runs_out_of_memory_continues_in_halves() -> None:
    session, data = begin(SHiRA(sparsity=0.9)), contract.examples(n=11)
    whole = evaluate(session.tuned, data, 8, session.accelerator)
    short = Short(session, 3)
    halved = evaluate(session.tuned, data, 8, session.accelerator)
    assert short.failed == 3
    assert [{**row, "loss": 0, "score": 0} for row in halved.rows] == [
        {**row, "loss": 0, "score": 0} for row in whole.rows
    ]
    assert halved.metrics == pytest.approx(whole.metrics, abs=1e-6)
    short.most = 0
    with pytest.raises(RunFailed, match="evaluation of a single example"):
        evaluate(session.tuned, data, 8, session.accelerator)


def test_halves_of_a_batch_are_all_of_it() -> None:
    from finetune.training.evaluate import _part

    batch = collate(contract.examples("llama")[:5])
    parts = [_part(batch, slice(2)), _part(batch, slice(2, None))]
    assert [i for part in parts for i in part.ids] == batch.ids
    for get in (lambda b: b.labels, lambda b: b.bytes, lambda b: b.inputs["attention_mask"]):
        assert torch.equal(torch.cat([get(p) for p in parts]), get(batch))


# whole runs


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *task.make(tmp_path_factory.mktemp("task")),
        "train.steps=6",
        "train.eval_every=3",
        "train.save_every=2",
        "method=shira",
        "sparsity=0.9",
    ]


def config(words: list[str], *more: str) -> Config:
    return load(list({text.partition("=")[0]: text for text in (*words, *more)}.values()))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every session memory for three examples a training pass."""
    real = Session.__init__

    def init(self: Session, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        self.model.register_forward_hook(
            lambda module, args, kwargs, output: _three(module, kwargs), with_kwargs=True
        )

    monkeypatch.setattr(Session, "__init__", init)


def _three(module: nn.Module, kwargs: dict[str, Tensor]) -> None:
    if module.training and torch.is_grad_enabled() and len(kwargs["pixel_values"]) > 3:
        raise NO_MEMORY["cuda"]


def go(settings: Config, folder: Path, stop: int | None = None) -> tuple[dict[str, Any], list[str]]:
    import signal

    def progress(done: int, total: int, words: str) -> None:
        if done == stop:
            signal.raise_signal(signal.SIGTERM)

    said: list[str] = []
    with Signals() as signals:
        return run.train(settings, folder, said.append, progress, signals), said


@pytest.mark.parametrize("size", ["8", "auto"])
def test_it_is_recorded_and_kept_by_a_resumed_run(
    words: list[str], size: str, short: None, tmp_path: Path
) -> None:
    settings = config(words, f"train.batch_size={size}")
    whole, said = go(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(settings, tmp_path / "resumed", stop=3)
    resumed, again = go(settings, tmp_path / "resumed")
    events = [{"step": 1, "from": 8, "to": 4}, {"step": 1, "from": 4, "to": 2}] if size == "8" else []
    sizes = (
        {"batch_size": 8, "micro_batch_size": 2}
        if size == "8"
        else {"batch_size": 2, "micro_batch_size": None}
    )
    assert whole["batch"] == resumed["batch"] == {**sizes, "out_of_memory": events}
    assert (whole["processes"], resumed["processes"]) == (1, 1)
    assert not differences(tmp_path / "whole", tmp_path / "resumed")
    assert sum("Memory ran out" in line for line in said) == len(events)
    assert sum("batch_size=auto: 2 examples" in line for line in said) == (size == "auto")
    assert not any("Memory ran out" in line or "=auto" in line for line in again), (
        "a resumed run has the sizes from its checkpoint"
    )
    if size == "8":
        told, _ = go(config(words, "train.micro_batch_size=2"), tmp_path / "told")
        assert told["metrics"] == whole["metrics"]
        assert told["batch"]["out_of_memory"] == []
        assert (tmp_path / "told/delta/delta.safetensors").read_bytes() == (
            tmp_path / "whole/delta/delta.safetensors"
        ).read_bytes()
