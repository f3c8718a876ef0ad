"""Several processes that train together: they end alike to the bit, and as one process at the same global batch. Two, then four, started once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune import registry
from finetune.core import collective
from finetune.core.method import Method
from finetune.errors import RunFailed
from finetune.methods.baseline.bitfit import BitFit
from finetune.methods.baseline.full import Full
from finetune.methods.baseline.head import Head
from finetune.methods.reparam.amt import AMT
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.peft import Peft
from finetune.methods.reparam.snell import SNELL
from finetune.methods.reparam.snella import SNELLA
from finetune.methods.sparse.hft import HFT
from finetune.methods.sparse.id3 import ID3
from finetune.methods.sparse.lift import LIFT
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.methods.sparse.off_principal import OffPrincipal
from finetune.methods.sparse.s2ft import S2FT
from finetune.methods.sparse.sara import SaRA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.sparse import Crossing
from finetune.methods.sparse.spiel import SpIEL
from finetune.methods.sparse.spt import SPT
from finetune.methods.sparse.super_tuning import SuperTuning
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.redraw import Redraw
from finetune.selectors.ist import IST
from finetune.testing import contract, ranks
from finetune.training.evaluate import evaluate
from finetune.training.prepare import make_accelerator
from finetune.training.session import Session

# what is trained does not depend on the data, so that one process must end where two do
FIXED: dict[str, Callable[[], Method]] = {
    "full": Full,
    "head": Head,
    "bitfit": BitFit,
    "lora": lambda: LoRA(rank=4),
    "snell": lambda: SNELL(rank=8, sparsity=0.0),
    "shira": lambda: SHiRA(sparsity=0.9),
    "super_tuning": lambda: SuperTuning(sparsity=0.9, branch=2),
    "off_principal": lambda: OffPrincipal(rank=4),
    "s2ft": lambda: S2FT(d=0.1, u=0.1),
    "hft": lambda: HFT(rounds=3),
    "peft": lambda: Peft(config={"r": 4}),
    "sparse": lambda: Crossing(sparsity=0.9, schedule=Redraw(every=2)),
}
# entries, thresholds or masks go by gradients or by what training did, where nearly tied numbers may change places
CHOSEN: dict[str, Callable[[], Method]] = {
    "snell": lambda: SNELL(rank=8, sparsity=0.9, dropout=0.1),
    "snella": lambda: SNELLA(rank=8, every=2),
    "lift": lambda: LIFT(sparsity=0.9, rank=4, schedule=Redraw(every=2)),
    "id3": lambda: ID3(sparsity=0.9),
    "lt_sft": lambda: LTSFT(sparsity=0.9, l1=0.1),
    "sparse": lambda: Crossing(
        sparsity=0.9, score="snip", scope="role", grain="row", schedule=DropGrow(every=2)
    ),
    "spiel": lambda: SpIEL(sparsity=0.9, schedule=DropGrow(every=3), window=2),
    "sara": lambda: SaRA(sparsity=0.9),
    "spt": lambda: SPT(sparsity=0.9, rank=4, alpha=4.0, batches=2),
    "amt": AMT,
}
TRAIN = replace(contract.TRAIN, steps=4)
CASES = {
    "some": (["lora", "shira", "peft"], ["spiel"]),
    "most": (list(FIXED), ["spiel"]),
    "all": (list(FIXED), list(CHOSEN)),
}
Kept = dict[str, Tensor]


def test_every_method_is_a_case() -> None:
    assert FIXED.keys() | CHOSEN.keys() == registry.catalog("method").keys()


def trained(name: str, session: Session) -> Kept:
    """What a run goes through and ends with."""
    kept, seen = {}, list[str]()
    for step in session.steps():
        kept[f"{name}/loss {step.number}"] = torch.tensor(step.loss, dtype=torch.float64)
        seen += [i for batch in session.run.batch if batch for i in batch.ids]
    kept[f"{name}/seen"] = torch.tensor(sorted(map(int, seen)))
    return kept | {
        f"{name}/state {key}": t.clone().contiguous() for key, t in session.states.state_dict().items()
    }


def everything(fixed: list[str], chosen: list[str]) -> Kept:
    """These cases, and some others. With Adam's ``eps`` large, noise in gradients that are 0 moves nothing."""
    contract.OPTIMIZER = replace(contract.OPTIMIZER, eps=1e-3)
    kept: Kept = {}
    cases = {f"fixed {name}": FIXED[name] for name in fixed} | {
        f"chosen {name}": CHOSEN[name] for name in chosen
    }
    for name, make in cases.items():  # every third batch has five examples: three here and two there
        kept |= trained(name, contract.begin(make(), train=replace(TRAIN, micro_batch_size=3)))
    kept |= trained("fixed llama", contract.begin(LoRA(rank=2), "llama", replace(TRAIN, micro_batch_size=2)))
    kept |= trained("chosen ist", contract.begin(LoRA(rank=2), train=TRAIN, selector=IST(every=2)))
    # one example a step: all but one process have none, also where gradients are looked at before the step
    one = replace(TRAIN, batch_size=1)
    kept |= trained("fixed few", contract.begin(LoRA(rank=4), train=one))
    kept |= trained(
        "chosen few",
        contract.begin(Crossing(sparsity=0.9, score="gradient", schedule=DropGrow(every=2)), train=one),
    )
    kept |= trained("chosen few spiel", contract.begin(CHOSEN["spiel"](), train=one))
    return kept | evaluated() | exchanged()


def evaluated() -> Kept:
    """The rows of an evaluation in batches of four, the last one smaller, as this process has them."""
    session = contract.begin(SHiRA(sparsity=0.9))
    found = evaluate(session.tuned, contract.examples(n=21), 4, session.accelerator)
    few = evaluate(
        session.tuned, contract.examples(n=2), 4, session.accelerator
    )  # of which only the first process has any
    text = json.dumps([found.metrics, found.rows, few.metrics, few.rows])
    return {"evaluated": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def exchanged() -> Kept:
    """Sums of gradients: one that nobody has, one that only the last process has, and more than one bucket."""
    rank = make_accelerator(contract.TRAIN).process_index
    collective.BUCKET = 5
    parameters = [torch.zeros(n, requires_grad=True) for n in (4, 3, 7)] + [
        torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ]
    parameters[0].grad, parameters[2].grad, parameters[3].grad = (
        torch.ones(4) * (rank + 1),
        torch.arange(7.0),
        torch.ones(2).double(),
    )
    if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        parameters[1].grad = torch.ones(3)
    collective.add_gradients(parameters)
    collective.BUCKET = 1 << 23
    kept = {f"sums {i}": p.grad if p.grad is not None else torch.empty(0) for i, p in enumerate(parameters)}
    kept["gathered"] = torch.tensor(collective.gather(rank))
    return kept | {"anyone": torch.tensor([collective.anyone(rank == 1), collective.anyone(False)])}


@pytest.fixture(
    scope="module",
    params=["2 some", *(pytest.param(which, marks=pytest.mark.slow) for which in ("2 all", "4 most"))],
)
def asked(request: pytest.FixtureRequest) -> tuple[int, str]:
    """How many processes, and which cases."""
    world, cases = request.param.split()
    return int(world), cases


@pytest.fixture(scope="module")
def alone(asked: tuple[int, str]) -> Kept:
    before = contract.OPTIMIZER
    try:
        return everything(CASES[asked[1]][0], ["spiel"])
    finally:
        contract.OPTIMIZER = before


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
    assert sum(name.endswith("/seen") for name in names) == len(CASES[asked[1]][0]) + 2
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
    assert collective.agree(t) is t
    assert collective.total(t) is t
    assert collective.gather("x") == ["x"]
    assert (collective.anyone(True), collective.anyone(False)) == (True, False)
    collective.meet()


# out of memory on one process only: all halve, and none waits for one that does something else


def limited(most: int, where: str) -> Callable[[Any, Any], None]:
    """A hook that finds no memory for more than ``most`` examples on the second process (or, alone, on the only one)."""

    def check(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if len(kwargs["pixel_values"]) <= most or int(os.environ.get("RANK", "1")) != 1:
            return
        if where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if output.logits.requires_grad:
            output.logits.register_hook(_no_memory)

    return check  # type: ignore[return-value]


def _no_memory(grad: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def short_of_memory(most: int | None) -> Kept:
    """Runs that find memory for ``most`` examples a pass, or are told so from the start (None)."""
    kept: Kept = {}
    for name, method in {
        "lora": LoRA(rank=2),
        "spiel": CHOSEN["spiel"](),
        "lt_sft": CHOSEN["lt_sft"](),
    }.items():
        for where in ("forward", "backward"):
            session = contract.begin(method, train=replace(TRAIN, micro_batch_size=None if most else 2))
            if most:
                session.model.register_forward_hook(limited(most, where), with_kwargs=True)
            kept |= trained(f"{name} {where}", session)
            halved = [[event["step"], event["from"], event["to"]] for event in session.memory.events]
            kept[f"{name} {where}/halved"] = torch.tensor(halved, dtype=torch.int64)
    return kept


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> list[Kept]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHORT", "1")
        return ranks.run(__file__, tmp_path_factory.mktemp("short"))


@pytest.mark.slow
def test_all_processes_halve_where_one_runs_out(short: list[Kept]) -> None:
    first, second = short
    for name, tensor in first.items():
        assert name.endswith("/seen") or torch.equal(tensor, second[name]), name
        if name.endswith("/halved"):
            assert tensor.tolist() == [] if name.startswith("told") else [[1, 4, 2]], name
        elif name.startswith("found"):
            assert torch.equal(tensor, first[name.replace("found", "told")]), name


@pytest.mark.slow
def test_a_process_that_cannot_halve_ends_all(short: list[Kept]) -> None:
    assert [kept["failed"].item() for kept in short] == [1, 1]


def shortage() -> Kept:
    kept = {f"found {k}": t for k, t in short_of_memory(2).items()} | {
        f"told {k}": t for k, t in short_of_memory(None).items()
    }
    session = contract.begin(LoRA(rank=2))
    session.model.register_forward_hook(limited(0, "forward"), with_kwargs=True)
    try:
        contract.finish(session)
    except RunFailed as error:
        kept["failed"] = torch.tensor(int("one example at a time" in str(error)))
    return kept


if __name__ == "__main__":
    save_file(shortage() if os.environ.get("SHORT") else everything(*CASES[os.environ["CASES"]]), sys.argv[1])
