"""Interventions on attention heads, in float64, and what becomes of a run's updates.

The numbered invariant is that of the card of arXiv 2511.08567.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from finetune.analyses import interventions
from finetune.analyses.geometry import Update
from finetune.analyses.interventions import HeadChange, Interventions, Overlap, change_block
from finetune.artifacts.analyze import analyze
from finetune.config.load import load
from finetune.core.anatomy import Anatomy
from finetune.core.site import Site
from finetune.data.encode import collate
from finetune.errors import ConfigError
from finetune.testing import contract
from finetune.testing.analyses import check_analysis
from finetune.testing.sessions import Kind
from finetune.training.run import train

from ..support import task

KINDS = ("vit", "gpt2", "llama", "qwen2", "bert")
ATTENTION = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "c_attn", "o_proj", "c_proj")


def make(kind: str) -> Any:
    """Make a float64 model whose biases and norms are random, too, and whose attention looks at something."""
    t: Any = transformers
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if kind == "qwen2":  # grouped queries with biases of q, k and v
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=40))
    elif kind == "bert":
        model = t.BertForMaskedLM(t.BertConfig(**sizes, vocab_size=40))
    else:
        known: Kind = kind  # type: ignore[assignment]
        model = contract.tiny(known)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def logits(model: Any, kind: str) -> Tensor:
    inputs = collate(contract.examples("vit" if kind == "vit" else "gpt2")[:4]).inputs
    for name, tensor in inputs.items():
        inputs[name] = tensor.double() if tensor.is_floating_point() else tensor
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def intervene(model: Any, kind: str) -> list[HeadChange]:
    """Change every block; return the changes."""
    anatomy = Anatomy.of(model)
    changes = [HeadChange.draw(kind, anatomy, 0, number) for number in range(len(anatomy.blocks))]
    for block, change in zip(anatomy.blocks, changes, strict=True):
        change_block(block, change)
    return changes


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(KINDS, ("rotate", "permute"))])
def test_interventions_leave_the_logits_as_they_were(name: str, kind: str) -> None:
    """Invariant 8, up to rounding of float64, with biases and with grouped queries."""
    model = make(name)
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, logits(model, name)
    intervene(model, kind)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(
        logits(model, name), expected, rtol=0, atol=1e-11 * float(expected.abs().max())
    )
    moved = {n.rpartition(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not [n for n in moved if not n.endswith(ATTENTION) and "output.dense" not in n]
    if kind == "rotate":
        assert not [n for n in moved if n.endswith(("q_proj", "k_proj", "query", "key"))]


def test_a_wrong_intervention_is_seen() -> None:
    """The comparison of logits notices a rotation of v alone, and heads of q that move alone."""
    for role, kind in (("v", "rotate"), ("q", "permute")):
        model, plain = make("llama"), make("llama")
        (block, _), anatomy = Anatomy.of(model).blocks, Anatomy.of(model)
        site = block.attention.sites[role]
        change = HeadChange.draw(kind, anatomy, 0, 0)
        with torch.no_grad():
            site.module.weight.copy_(change.map_matrix(site.module.weight.clone(), role))
        inputs = collate(contract.examples("gpt2")[:4]).inputs
        assert interventions.measure_function_error(plain, model, inputs) > 0.01
        assert interventions.measure_function_error(plain, plain, inputs) == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_permutation_moves_every_head_and_no_bit_of_it(name: str) -> None:
    model = make(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    (change, _) = intervene(model, "permute")
    heads = Anatomy.of(model).kv_heads
    assert change.order is not None
    assert sorted(change.order.tolist()) == list(range(heads))
    assert all(place != head for place, head in enumerate(change.order.tolist()))
    for role, site in Anatomy.of(model).blocks[0].attention.sites.items():
        old = site.as_matrix(before[f"{site.name}.weight"])
        new = site.as_matrix(site.module.get_parameter("weight"))
        assert not torch.equal(new, old)
        assert torch.equal(change.put_in_order(new, role), old)


def test_heads_move_with_their_queries() -> None:
    """By hand: two heads of keys and values, each with two heads of queries of width 1."""
    change = HeadChange(2, order=torch.tensor([1, 0]))
    rows = torch.arange(4.0)[:, None]
    assert change.map_matrix(rows, "q")[:, 0].tolist() == [2, 3, 0, 1]
    assert change.map_matrix(rows[:2], "v")[:, 0].tolist() == [1, 0]
    assert change.map_matrix(rows.T, "o")[0].tolist() == [2, 3, 0, 1]


def test_a_rotation_is_orthogonal_and_turns_each_head_by_itself() -> None:
    anatomy: Any = SimpleNamespace(kv_heads=2, head_dim=3)
    rotation = HeadChange.draw("rotate", anatomy, 0, 0).rotation
    assert rotation is not None
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3).double(), atol=1e-14, rtol=0)
    other = HeadChange.draw("rotate", anatomy, 0, 1).rotation
    assert not torch.equal(rotation, other)  # type: ignore[arg-type]
    v, o = torch.randn(6, 5).double(), torch.randn(7, 12).double()
    change = HeadChange(2, rotation=rotation)
    both = torch.block_diag(rotation, rotation)
    torch.testing.assert_close(change.map_matrix(v, "v"), both.T @ v)
    torch.testing.assert_close(change.map_matrix(o, "o"), o @ torch.block_diag(both, both))
    assert torch.equal(change.map_matrix(v, "q"), v)


def test_overlap_of_equal_and_of_independent_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(400, 500, generator=generator) < share for share in (0.3, 0.6))
    equal, independent, empty = Overlap(), Overlap(), Overlap()
    equal.add(first, first)
    independent.add(first, second)
    empty.add(first & False, first & False)
    assert (equal.jaccard, equal.excess) == (1.0, 1.0)
    p, q = float(first.double().mean()), float(second.double().mean())
    assert independent.chance == pytest.approx(p * q / (p + q - p * q))
    assert independent.jaccard == pytest.approx(float((first & second).sum() / (first | second).sum()))
    assert abs(independent.excess or 1) < 0.01
    assert (empty.jaccard, empty.chance, empty.excess) == (None, None, None)


def test_matrices_that_stay_do_not_decide_which_changes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that changed everywhere, by less than bfloat16 shows in all entries but one."""
    start, moved = torch.ones(4, 4), torch.ones(4, 4) + 1e-6
    moved[0, 0] = 2
    found = []
    for name, after in (("a", moved), ("b", start), ("c", start)):
        found.append(Update(Site(name, nn.Linear(4, 4), 0, "v", (4, 4)), start, after))
    monkeypatch.setattr(interventions, "updates", lambda setup: iter(found))
    setup: Any = None
    changed, in_bf16 = interventions._find_changed(setup, None)
    assert in_bf16
    assert changed["a"].mask.nonzero().tolist() == [[0, 0]]
    assert not changed["b"].mask.any()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    made = task.make(tmp_path_factory.mktemp("task"), images=24)
    return [word.replace("lr=0.02", "lr=3e-4") for word in made] + ["train.steps=4"]


def start(folder: Path, words: list[str], *more: str) -> Path:
    train(load([*words, *more]), folder, lambda line: None, lambda done, total, words: None)
    return folder


@pytest.fixture(scope="module")
def run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("runs") / "run", words, "method=full")


def test_updates_follow_a_permutation(run: Path) -> None:
    """Adam treats every entry alike, so heads in another order learn the same in another place."""
    found = analyze(Interventions(kind="permute"), [run]).result["summary"]
    assert found["function_error"] < 1e-5
    assert found["excess_intervened"] < 0.2
    assert found["excess_elsewhere"] > 0.9
    assert found["jaccard_in_order"] > 0.95


@pytest.mark.slow
def test_updates_do_not_stay_in_a_rotated_basis(run: Path) -> None:
    table = analyze(Interventions(), [run]).table
    assert table.summary["excess_intervened"] < 0.2
    assert table.summary["excess_elsewhere"] > 0.9
    for row in table.rows:
        name = row["layer"]
        assert row["intervened"] == (".0." in name and name.endswith(("v_proj", "o_proj")))
    assert table.summary["jaccard_in_order"] is None


@pytest.mark.slow
def test_without_an_intervention_the_run_repeats_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: whatever the overlap lacks comes from the intervention and not from training again."""
    monkeypatch.setattr(interventions, "change_block", lambda block, change: None)
    found = analyze(Interventions(), [run])
    assert found.result["summary"]["function_error"] == 0
    assert {row["jaccard"] for row in found.table.rows} <= {1.0, None}
    assert found.result["summary"]["jaccard_intervened"] == 1


@pytest.mark.slow
def test_a_base_that_loses_its_function_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_(block: Any, change: HeadChange) -> None:
        block.attention.sites["v"].module.weight.data.neg_()

    monkeypatch.setattr(interventions, "change_block", break_)
    with pytest.raises(ConfigError, match=r"kind=rotate does not keep the function of the model of"):
        analyze(Interventions(), [run])


def test_blocks_and_heads_that_are_not_there_are_refused() -> None:
    subject: Any = SimpleNamespace(path=Path("RUN"))
    anatomy: Any = SimpleNamespace(
        blocks=[SimpleNamespace(name=f"layers.{i}") for i in range(3)], kv_heads=1, head_dim=2
    )
    assert list(Interventions()._draw_changes(anatomy, subject)) == [0, 2]
    with pytest.raises(ConfigError, match=r"what\.blocks: the model of RUN has no block 7; its last is 2"):
        Interventions(blocks=(1, 7))._draw_changes(anatomy, subject)
    with pytest.raises(ConfigError, match=r"what\.kind=permute needs two heads .* Take kind=rotate"):
        Interventions(kind="permute")._draw_changes(anatomy, subject)


@pytest.mark.slow
def test_contract(run: Path, words: list[str], tmp_path: Path) -> None:
    mlp = start(tmp_path / "mlp", words, "method=lora", "method.targets=[mlp]")
    check_analysis(Interventions(blocks=(1,)), [run], [[mlp]])
    with pytest.raises(ConfigError, match=r"changed none of those in the blocks 0\. Choose other"):
        analyze(Interventions(), [mlp])
