"""The Python front door: other loops give the bits of our loop; runs are trained, loaded and listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import finetune
from finetune.core.loss import count, example_losses
from finetune.core.method import Method
from finetune.data.encode import Batch
from finetune.errors import ConfigError
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.snell import SNELL
from finetune.methods.sparse.sara import SaRA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.spiel import SpIEL
from finetune.optim.adamw import AdamW
from finetune.testing import contract
from finetune.training.session import Session

from .support.tiny_model import TINY

HEAD = ("classifier.weight", "classifier.bias")
RATE = 1e-2
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2),
    "shira": SHiRA(sparsity=0.9),
    "snell": SNELL(rank=4, sparsity=0.5),
    "spiel": SpIEL(sparsity=0.9, batches=1),
    "sara": SaRA(sparsity=0.9, penalty=0.1),
}


def our_loop(method: Method) -> Session:
    """Train by the package's own loop, at a constant rate and without clipping."""
    optimizer = AdamW(lr=RATE, schedule="constant", warmup=0.0)
    settings = contract.TRAIN.__class__(steps=contract.STEPS, batch_size=8, device="cpu", clip=None)
    return contract.finish(contract.begin(method, train=settings, optimizer=optimizer))


def batches() -> list[Batch]:
    """The batches of our loop, in its order."""
    session = contract.begin(LoRA(rank=2))
    found: list[Batch] = []
    for step in session.batches.steps(0, contract.STEPS):
        found += [batch for batch in step if batch]
    assert len(found) == contract.STEPS
    return found


def sum_and_count(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    return example_losses(model(**batch.inputs).logits, batch.labels).sum(), count(batch.labels)


def attach(method: Method, data: list[Batch]) -> finetune.api.Handle:
    handle: finetune.api.Handle

    def upcoming(steps: int) -> list[list[Batch]]:
        return [[batch] for batch in data[handle.number : handle.number + steps]]

    handle = finetune.attach(
        contract.tiny(), method, steps=contract.STEPS, head=HEAD, loss=sum_and_count, upcoming=upcoming
    )
    return handle


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_loop_of_one_s_own_gives_our_bits(method: Method) -> None:
    """With a penalty in the loss (SaRA) the gradient is summed in another order, and rounds differently."""
    data = batches()
    handle = attach(method, data)
    optimizer = handle.optimizer(lr=RATE)
    for batch in data:
        handle.module.train()
        with handle.step(optimizer):
            total, examples = sum_and_count(handle.model, batch)
            (total * (1 / examples)).backward()
    wanted = our_loop(method).states.state_dict()
    for name, tensor in handle._states.state_dict().items():
        if method.name == "sara":
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(tensor, wanted[name]), name
    assert handle.number == contract.STEPS


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The examples in the order in which our loop takes them, one batch after the other."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []
        for batch in batches()[:2]:  # both have eight examples, so batches of eight are those of our loop
            for pixels, label in zip(batch.inputs["pixel_values"], batch.labels, strict=True):
                self.rows.append({"pixel_values": pixels, "labels": label})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def trainer_of(handle: finetune.api.Handle, folder: Path, **options: Any) -> transformers.Trainer:
    settings: dict[str, Any] = {
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = transformers.TrainingArguments(str(folder), **(settings | options.pop("arguments", {})))
    given = {"model": handle.module, "optimizers": (handle.optimizer(lr=RATE), None)} | options
    return transformers.Trainer(args=arguments, train_dataset=Rows(), callbacks=[handle.callback()], **given)


@pytest.mark.parametrize("name", ["lora", "shira", "snell"])
def test_the_trainer_of_transformers_ends_with_our_loop_s_values(name: str, tmp_path: Path) -> None:
    """It averages the loss by itself, so the last bits differ."""
    handle = attach(METHODS[name], [])
    trainer_of(handle, tmp_path).train()
    ours = contract.begin(
        METHODS[name],
        train=contract.TRAIN.__class__(steps=2, batch_size=8, device="cpu", clip=None),
        optimizer=AdamW(lr=RATE, schedule="constant", warmup=0.0),
    )
    contract.finish(ours)
    start = attach(METHODS[name], [])._states.state_dict()
    moved = False
    for key, tensor in handle._states.state_dict().items():
        torch.testing.assert_close(tensor, ours.states.state_dict()[key], rtol=1e-4, atol=1e-5)
        moved |= not torch.equal(tensor, start[key])
    assert moved
    assert handle.number == 2


def test_a_trainer_that_would_drop_the_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove_unused_columns=True drops every column"):
        trainer_of(attach(METHODS["lora"], []), tmp_path, arguments={"remove_unused_columns": True})


def test_a_trainer_that_would_not_train_or_clip_is_refused(tmp_path: Path) -> None:
    handle = attach(METHODS["lora"], [])
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    trainer = trainer_of(handle, tmp_path, model=handle.model, optimizers=(other, None))
    trainer.args.max_grad_norm = 1.0
    with pytest.raises(ConfigError) as caught:
        trainer.train()
    assert [fault.split(".")[0] for fault in caught.value.faults] == [
        "The trainer's optimizer does not hold the trained tensors",
        "max_grad_norm=1",
    ]


def test_saved_merged_and_switched_off(tmp_path: Path) -> None:
    data = batches()
    handle = attach(METHODS["shira"], data)
    optimizer = handle.optimizer(lr=RATE)
    with handle.step(optimizer, clip=1.0):
        sum_and_count(handle.model, data[0])[0].backward()
    live = contract.logits(handle.module)
    handle.save(tmp_path / "delta")
    other = attach(METHODS["shira"], data)
    other.load(tmp_path / "delta")
    assert torch.equal(contract.logits(other.module), live)
    assert other.number == 1
    with handle.base():
        assert torch.equal(contract.logits(handle.module), contract.logits(contract.tiny()))
    merged = other.merge()
    assert type(merged) is type(contract.tiny())
    torch.testing.assert_close(contract.logits(merged), live, rtol=1e-4, atol=1e-5)
    contract.same_values(handle.detach(), contract.tiny())
    with pytest.raises(ConfigError, match="was made by"):
        attach(METHODS["lora"], data).load(tmp_path / "delta")


def test_a_step_that_raises_changes_nothing() -> None:
    handle = attach(METHODS["lora"], [])
    before = [p.detach().clone() for p in handle.parameters()]
    with pytest.raises(RuntimeError), handle.step(handle.optimizer(lr=RATE)):
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    assert handle.number == 0


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lorra", {}, "lorra"),
        ("lora", {"rnk": 3}, r"method\.rnk=3 .* Did you mean 'method\.rank'"),
        ("lt_sft", {}, "trains in several phases"),
        (LoRA(), {"rank": 3}, "go with a method's name"),
    ],
)
def test_what_cannot_be_attached(method: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        finetune.attach(contract.tiny(), method, **options)


def test_an_optimizer_that_measures_losses_itself_is_refused() -> None:
    handle = finetune.attach(contract.tiny(), "lora")
    with pytest.raises(ConfigError, match="optimizer=mezo measures losses itself"):
        handle.optimizer("mezo")


def test_a_method_says_what_the_loop_lacks() -> None:
    handle = finetune.attach(contract.tiny(), "sparse", score="gradient", sparsity=0.9)
    with (
        pytest.raises(ConfigError, match="needs the batches of the next steps: give attach"),
        handle.step(handle.optimizer(lr=RATE)),
    ):
        pass


def test_runs_are_trained_listed_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["method=lora", "method.dropout=0.5", "train.steps=2", "train.eval_every=null"]
    words += ["logger=none", "name=a", "run=b", *TINY]
    folder, result = finetune.train(*words)
    assert folder == Path("outputs/a/b")
    assert result["status"] == "finished"
    table = finetune.runs()
    (row,) = table.to_dict("records")
    assert row["test.accuracy"] == result["metrics"]["test"]["accuracy"]
    assert (row["method.name"], row["params.trained"]) == ("lora", result["params"]["trained"])
    model = finetune.load(folder)
    assert not model.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images).logits, model(images).logits)  # no dropout in the attached parts
    assert type(model).__name__ == "ViTForImageClassification"


def test_a_second_method_on_the_same_model_is_refused() -> None:
    model = contract.tiny()
    handle = finetune.attach(model, "lora")
    with pytest.raises(finetune.ConfigError, match=r"has a method attached already\. Call merge\(\)"):
        finetune.attach(model, "shira")
    handle.detach()
    finetune.attach(model, "adapter").detach()
    finetune.attach(model, "adapter")
    with pytest.raises(finetune.ConfigError, match="has a method attached already"):
        finetune.attach(model, "lora")


def test_save_replaces_nothing(tmp_path: Path) -> None:
    handle = finetune.attach(contract.tiny(), "lora")
    handle.save(tmp_path / "delta")
    with pytest.raises(finetune.ConfigError, match=r"delta exists\. Choose a new folder"):
        handle.save(tmp_path / "delta")


def test_faults_of_options_do_not_name_the_command_line() -> None:
    with pytest.raises(finetune.ConfigError, match=r"^method\.rank=0 should be"):
        finetune.attach(contract.tiny(), "lora", rank=0)
