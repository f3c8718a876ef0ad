"""Check the share of changed entries of a run against its merged folder, compared with the base by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from finetune.artifacts.merge import merge
from finetune.artifacts.reopen import rebuild
from finetune.core.layer import Patched
from finetune.models.load import original_parameters
from finetune.report.summary import describe_result
from finetune.training.plan import plan
from finetune.training.prepare import measure_changed

from ..support.plain_runs import Runs

CASES = {
    "lora": ["method=lora"],
    "one rank": ["method=lora", "method.rank=1", "method.targets=[q]"],
    "static": ["method=shira", "method.sparsity=0.9"],
    "kept": ["method=lift", "method.sparsity=0.9", "method.schedule.every=1"],
    "put back": ["method=sparse", "method.sparsity=0.9", "schedule=drop_grow", "method.schedule.every=1"],
    "branches": ["method=spt", "method.sparsity=0.9", "method.rank=1"],
    "masks": ["method=amt", "method.gdr=0", "method.initial=0.26", "optimizer.lr=0.01"],
    "all in place": ["method=full"],
    "half in place": ["method=hft"],
    "biases": ["method=bitfit"],
    "two phases": ["method=lt_sft", "method.sparsity=0.9"],
    "the head alone": ["method=head"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def read_result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_changed_is_the_share_of_the_adapted_entries_that_the_merged_folder_shows(
    runs: Runs, tmp_path: Path, case: str
) -> None:
    run = runs("vit", *CASES[case])
    result = read_result(run)
    setup = rebuild(run)
    merge(run, tmp_path / "merged")
    merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    tuned, differing = dict(merged.named_parameters()), 0
    for name, original in original_parameters(setup.base):
        differing += int((tuned[name] != original).sum())
    assert differing
    assert result["changed"] == differing / result["params"]["adapted"]
    assert measure_changed(setup) == result["changed"]
    bound = plan(setup.config)["changed_at_most"]
    assert result["changed"] <= bound <= 1
    if case in ("static", "put back"):
        assert bound < 0.2


def test_entries_that_left_count_where_they_keep_their_change(runs: Runs) -> None:
    kept, back = (read_result(runs("vit", *CASES[case])) for case in ("kept", "put back"))
    assert kept["params"]["trained"] == back["params"]["trained"]
    trained = kept["params"]["trained"] / kept["params"]["adapted"]
    assert kept["changed"] > 1.05 * trained
    assert back["changed"] <= trained
    assert plan(rebuild(runs("vit", *CASES["kept"])).config)["changed_at_most"] == 1


def test_a_small_change_of_a_base_in_bfloat16_is_lost_in_rounding(runs: Runs) -> None:
    words = ["method=lora", "train.precision=bf16", "optimizer.lr=1e-6"]
    assert read_result(runs("vit", *words, dtype="bfloat16"))["changed"] < 0.1


def test_the_state_that_is_stored_is_counted(runs: Runs) -> None:
    """With the first of three states as the best, few entries have been chosen so far."""
    words = [*CASES["kept"], "train.eval_every=1", "optimizer.lr=1", "train.steps=6"]
    run = runs("vit", *words)
    result = read_result(run)
    assert result["best_step"] < 6
    assert measure_changed(rebuild(run)) == result["changed"]


def test_the_summary_says_it(runs: Runs) -> None:
    result = read_result(runs("vit", *CASES["static"]))
    share = f"{100 * result['changed']:.3g} %"
    assert f"changed        {share} of the adapted entries" in describe_result(result, Path("run"))
    del result["changed"]
    assert "of the adapted entries" not in describe_result(result, Path("run"))


def test_a_tuner_of_peft_cannot_tell(runs: Runs) -> None:
    pytest.importorskip("peft")
    assert read_result(runs("vit", "method=peft", "method.config.r=2"))["changed"] is None


def test_full_fine_tuning_is_counted_without_a_second_model(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs("llama", "method=full")
    setup = rebuild(run)
    tuned, differing = dict(setup.session.model.named_parameters()), 0
    for name, original in load_file(runs.base("llama") / "model.safetensors").items():
        differing += int((tuned[name] != original).sum())
    monkeypatch.setattr("finetune.models.load.read_model", None)
    assert measure_changed(setup) == differing / setup.total
    assert read_result(run)["changed"] == differing / setup.total


def test_a_run_is_not_lost_where_memory_runs_out(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = rebuild(runs("vit", *CASES["lora"]))

    def run_out(layer: Patched) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Patched, "count_changed", run_out)
    assert measure_changed(setup) is None
