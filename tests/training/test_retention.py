"""Check the retention of a classifier against its merged model with the checkpoint's head, built by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from finetune.artifacts import merge
from finetune.artifacts import reopen as finished
from finetune.config.load import load
from finetune.data.digits import Digits
from finetune.models.processor import read_processor
from finetune.storage.run_folder import run_folder
from finetune.testing import contract
from finetune.training import run
from finetune.training.prepare import prepare

SMALL = [
    "train.steps=8",
    "train.batch_size=8",
    "optimizer.lr=0.03",
    "dataset.retention_images=30",
    "train.threads=1",
    "train.eval_every=null",
]


def answers(backbone: Path, head: Path) -> list[int]:
    """Return the classes of the retention images by the weights of ``backbone`` and the head of ``head``."""
    model, other = (
        AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
        for folder in (backbone, head)
    )
    model.classifier = other.classifier
    config = load(["model=tiny_vit"]).model
    processor, _ = read_processor(head, config, "image_classification", model)
    rows = Digits(retention_images=30).read().splits["retention"]
    pixels = torch.stack(
        [
            processor(images=row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
            for row in rows
        ]
    )
    with torch.no_grad():
        return list(model.eval()(pixels).logits.argmax(-1).tolist())


@pytest.mark.parametrize("method", ["full", "shira", "lora"])
def test_retention_is_the_share_of_the_pretrained_heads_answers_that_stay(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    original = tmp_path / "model"
    contract.tiny().save_pretrained(original)
    config = load([f"method={method}", "model=hf", f"model.path={original}", *SMALL])
    result = run.train(config, run_folder(config), lambda line: None, lambda done, total, words: None)
    merge.merge(run_folder(config), Path("merged"))
    before, after = answers(original, original), answers(Path("merged"), original)
    kept = sum(a == b for a, b in zip(before, after, strict=True)) / len(before)
    assert kept < 1  # so much was learnt that something is forgotten
    assert result["metrics"]["retention"]["accuracy"] == pytest.approx(kept)
    assert result["metrics"]["base_retention"]["accuracy"] == 1
    again = finished.evaluate(run_folder(config))["metrics"]
    assert again["retention"] == result["metrics"]["retention"]
    assert again["test"] == result["metrics"]["test"]


def test_measuring_leaves_the_model_and_its_own_head_as_they_were() -> None:
    setup = prepare(load(["method=full", *SMALL]))
    with torch.no_grad():
        for parameter in setup.session.states.parameters():
            parameter.add_(0.01)
    before = {name: t.clone() for name, t in setup.session.model.state_dict().items()}
    setup.evaluate("retention")
    after = setup.session.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_a_checkpoint_without_a_head_has_no_retention(tmp_path: Path) -> None:
    folder = tmp_path / "body"
    contract.tiny().vit.save_pretrained(folder)
    setup = prepare(load(["model=hf", f"model.path={folder}", "method=head", *SMALL]))
    assert setup.splits == ["train", "val", "test"]
    # the folder of this one has a head, which was never on the body that is drawn
    assert prepare(load(["model.init=random", "method=head", *SMALL])).splits == ["train", "val", "test"]
