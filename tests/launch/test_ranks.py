"""Several processes that train together have the same bits, and end as one process with the whole batch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.core import collective
from finetune.core.method import Method
from finetune.errors import RunFailed
from finetune.methods.reparam.lora import LoRA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.sparse import Crossing
from finetune.schedules.drop_grow import DropGrow
from finetune.selectors.ist import IST
from finetune.testing import contract, ranks, sessions
from finetune.testing.cases import Case, find_cases
from finetune.training.evaluate import evaluate
from finetune.training.prepare import make_accelerator
from finetune.training.session import Session

CASES = {case.name: case for case in find_cases(Path(__file__).parents[1] / "methods")}
FAMILIES = sorted({case.family for case in CASES.values()})
SAMPLE = ("lora", "shira", "peft lora", "spiel")  # one of each kind of part; all are among the slow tests
SPIEL = CASES["spiel"].make
TRAIN = replace(contract.TRAIN, steps=4)
OPTIMIZER = replace(sessions.OPTIMIZER, eps=1e-3)  # so large that noise in gradients that are 0 moves nothing
Kept = dict[str, Tensor]


def cases_named(which: str) -> list[Case]:
    """Return the cases of the sample, of a family, or all that do not depend on the data."""
    if which == "sample":
        return [CASES[name] for name in SAMPLE]
    if which == "fixed":
        return [case for case in CASES.values() if not case.data_dependent] + [CASES["spiel"]]
    return [case for case in CASES.values() if case.family == which]


def trained(name: str, session: Session) -> Kept:
    """Train, and return the loss of each step, the examples seen and the final state."""
    kept, seen = {}, list[str]()
    for step in session.steps():
        kept[f"{name}/loss {step.number}"] = torch.tensor(step.loss, dtype=torch.float64)
        for batch in session.run.batch:
            seen += batch.ids if batch else []
    kept[f"{name}/seen"] = torch.tensor(sorted(int(number) for number in seen))
    for key, tensor in session.states.state_dict().items():
        kept[f"{name}/state {key}"] = tensor.clone().contiguous()
    return kept


def begin(method: Method, **options: Any) -> Session:
    return contract.begin(method, **{"train": TRAIN, "optimizer": OPTIMIZER, **options})


def everything(cases: list[Case]) -> Kept:
    """Train these cases and a few special ones. ``chosen`` marks cases that depend on the data."""
    kept: Kept = {}
    uneven = replace(
        TRAIN, micro_batch_size=3
    )  # every third batch has five examples: three here and two there
    for case in cases:
        how, optimizer = "chosen" if case.data_dependent else "fixed", replace(case.optimizer, eps=1e-3)
        kept |= trained(f"{how} {case.name}", begin(case.make(), train=uneven, optimizer=optimizer))
    uneven = replace(TRAIN, micro_batch_size=2)
    kept |= trained("fixed llama", begin(LoRA(rank=2), kind="llama", train=uneven))
    kept |= trained("chosen ist", begin(LoRA(rank=2), selector=IST(every=2)))
    # one example a step: only one process has it, also where gradients are looked at before the step
    one = replace(TRAIN, batch_size=1)
    gradient = Crossing(sparsity=0.9, score="gradient", schedule=DropGrow(every=2))
    kept |= trained("fixed few", begin(LoRA(rank=4), train=one))
    kept |= trained("chosen few", begin(gradient, train=one))
    kept |= trained("chosen few spiel", begin(SPIEL(), train=one))
    return kept | evaluated() | exchanged()


def evaluated() -> Kept:
    """Return, as bytes, the rows of an evaluation in batches of four, the last one smaller."""
    session = contract.begin(SHiRA(sparsity=0.9))
    found = evaluate(session.tuned, contract.examples(n=21), 4, session.accelerator)
    few = evaluate(session.tuned, contract.examples(n=2), 4, session.accelerator)  # all on the first process
    text = json.dumps([found.metrics, found.rows, few.metrics, few.rows])
    return {"evaluated": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def exchanged() -> Kept:
    """Sum gradients: one that no process has, one that only the last has, and more than one bucket."""
    rank = make_accelerator(contract.TRAIN).process_index
    collective.BUCKET = 5
    parameters = [torch.zeros(n, requires_grad=True) for n in (4, 3, 7)]
    parameters.append(torch.zeros(2, dtype=torch.float64, requires_grad=True))
    parameters[0].grad = torch.ones(4) * (rank + 1)
    parameters[2].grad = torch.arange(7.0)
    parameters[3].grad = torch.ones(2).double()
    if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        parameters[1].grad = torch.ones(3)
    collective.add_gradients(parameters)
    collective.BUCKET = 1 << 23
    kept = {}
    for i, parameter in enumerate(parameters):
        kept[f"sums {i}"] = torch.empty(0) if parameter.grad is None else parameter.grad
    kept["gathered"] = torch.tensor(collective.gather(rank))
    kept["anyone"] = torch.tensor([collective.any_process(rank == 1), collective.any_process(False)])
    return kept


PROCESSES, SLOW = [pytest.mark.processes], [pytest.mark.processes, pytest.mark.slow]
SETS = [
    pytest.param("2 sample", marks=PROCESSES),
    *(pytest.param(f"2 {family}", marks=SLOW) for family in FAMILIES),
    pytest.param("4 fixed", marks=SLOW),
]


@pytest.fixture(scope="module", params=SETS)
def asked(request: pytest.FixtureRequest) -> tuple[int, str]:
    """The number of processes, and the name of a set of cases."""
    world, cases = request.param.split()
    return int(world), cases


@pytest.fixture(scope="module")
def alone(asked: tuple[int, str]) -> Kept:
    return everything(cases_named(asked[1]))


@pytest.fixture(scope="module")
def together(asked: tuple[int, str], tmp_path_factory: pytest.TempPathFactory) -> list[Kept]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASES", asked[1])
        return ranks.run(__file__, tmp_path_factory.mktemp("ranks"), asked[0])


def test_all_processes_end_alike_to_the_bit(together: list[Kept]) -> None:
    for other in together[1:]:
        assert other.keys() == together[0].keys()
        for name, tensor in together[0].items():
            assert name.endswith("/seen") or torch.equal(tensor, other[name]), name


def test_they_end_as_one_process_does(together: list[Kept], alone: Kept, asked: tuple[int, str]) -> None:
    names = [name for name in together[0] if name.startswith("fixed")]
    fixed = [case for case in cases_named(asked[1]) if not case.data_dependent]
    assert sum(name.endswith("/seen") for name in names) == len(fixed) + 2
    for name in names:
        if not name.endswith("/seen"):
            torch.testing.assert_close(
                together[0][name],
                alone[name],
                atol=1e-5,
                rtol=1e-5,
                msg=lambda why, name=name: f"{name}: {why}",
            )


def test_what_goes_by_the_data_is_nearly_the_same(together: list[Kept], alone: Kept) -> None:
    for name in [name for name in alone if name.startswith("chosen") and "/loss" in name]:
        torch.testing.assert_close(
            together[0][name], alone[name], atol=0.02, rtol=0.05, msg=lambda why, name=name: f"{name}: {why}"
        )


def test_together_they_see_each_example_as_often_as_one_does(together: list[Kept], alone: Kept) -> None:
    for name in [name for name in alone if name.endswith("/seen")]:
        assert torch.equal(torch.cat([kept[name] for kept in together]).sort().values, alone[name]), name
    assert [len(kept["fixed few/seen"]) for kept in together] == [TRAIN.steps] + [0] * (len(together) - 1)


def test_an_evaluation_gives_the_very_numbers_of_one_process(together: list[Kept], alone: Kept) -> None:
    assert torch.equal(together[0]["evaluated"], alone["evaluated"])
    _, rows, _, few = json.loads(bytes(together[0]["evaluated"].tolist()))
    assert [row["id"] for row in rows] == [str(i) for i in range(21)]
    assert [row["id"] for row in few] == ["0", "1"]


def test_gradients_add_up(together: list[Kept]) -> None:
    world, kept = len(together), together[0]
    assert torch.equal(kept["sums 0"], torch.full((4,), world * (world + 1) / 2))
    assert torch.equal(kept["sums 1"], torch.ones(3))
    assert torch.equal(kept["sums 2"], torch.arange(7.0) * world)
    assert torch.equal(kept["sums 3"], torch.full((2,), float(world), dtype=torch.float64))
    assert kept["gathered"].tolist() == list(range(world))
    assert kept["anyone"].tolist() == [True, False]


def test_alone_nothing_is_exchanged() -> None:
    t = torch.ones(2)
    assert collective.average_or_broadcast(t) is t
    assert collective.sum_processes(t) is t
    assert collective.gather("x") == ["x"]
    assert (collective.any_process(True), collective.any_process(False)) == (True, False)
    collective.barrier()


# If one process runs out of memory, all halve their micro-batches, and no collective is left waiting.


def limited(most: int, where: str) -> Callable[[Any, Any], None]:
    """Make a hook that finds no memory for more than ``most`` examples on the second process, or on the only
    one.
    """

    def check(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if len(kwargs["pixel_values"]) <= most or int(os.environ.get("RANK", "1")) != 1:
            return
        if where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if output.logits.requires_grad:
            output.logits.register_hook(_no_memory)

    return check


def _no_memory(grad: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def short_of_memory(most: int | None) -> Kept:
    """Train with memory for ``most`` examples a pass, or with that size given from the start (None)."""
    kept: Kept = {}
    for name, method in {"lora": LoRA(rank=2), "spiel": SPIEL(), "lt_sft": CASES["lt_sft"].make()}.items():
        for where in ("forward", "backward"):
            session = contract.begin(method, train=replace(TRAIN, micro_batch_size=None if most else 2))
            if most:
                session.model.register_forward_hook(limited(most, where), with_kwargs=True)
            kept |= trained(f"{name} {where}", session)
            halved = [[event["step"], event["from"], event["to"]] for event in session.memory.halvings]
            kept[f"{name} {where}/halved"] = torch.tensor(halved, dtype=torch.int64)
    return kept


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> list[Kept]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHORT", "1")
        return ranks.run(__file__, tmp_path_factory.mktemp("short"))


@pytest.mark.processes
@pytest.mark.slow
def test_all_processes_halve_where_one_runs_out(short: list[Kept]) -> None:
    first, second = short
    for name, tensor in first.items():
        assert name.endswith("/seen") or torch.equal(tensor, second[name]), name
        if name.endswith("/halved"):
            assert tensor.tolist() == [] if name.startswith("told") else [[1, 4, 2]], name
        elif name.startswith("found"):
            assert torch.equal(tensor, first[name.replace("found", "told")]), name


@pytest.mark.processes
@pytest.mark.slow
def test_a_process_that_cannot_halve_ends_all(short: list[Kept]) -> None:
    assert [kept["failed"].item() for kept in short] == [1, 1]


def shortage() -> Kept:
    kept = {}
    for name, most in (("found", 2), ("told", None)):
        for key, tensor in short_of_memory(most).items():
            kept[f"{name} {key}"] = tensor
    session = contract.begin(LoRA(rank=2))
    session.model.register_forward_hook(limited(0, "forward"), with_kwargs=True)
    try:
        contract.finish(session)
    except RunFailed as error:
        kept["failed"] = torch.tensor(int("one example at a time" in str(error)))
    return kept


if __name__ == "__main__":
    if os.environ.get("SHORT"):
        save_file(shortage(), sys.argv[1])
    else:
        save_file(everything(cases_named(os.environ["CASES"])), sys.argv[1])
