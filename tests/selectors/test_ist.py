"""Test IST over low-rank parts and over the sparse bank.

The oracles are plain layers with the damped change written in, and a plain run.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from finetune.core.attach import patched
from finetune.core.method import Method
from finetune.core.selector import Selector
from finetune.core.sparse.bank import SparseDelta
from finetune.data.encode import collate
from finetune.errors import ConfigError
from finetune.methods.baseline.bitfit import BitFit
from finetune.methods.baseline.full import Full
from finetune.methods.baseline.head import Head
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.peft import Peft
from finetune.methods.reparam.snell import SNELL
from finetune.methods.sparse.shira import SHiRA
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.redraw import Redraw
from finetune.selectors.ist import IST, ScoredBlocks
from finetune.selectors.none import NoSelector
from finetune.storage import checkpoint
from finetune.storage.delta import load_delta, save_delta, tensors_to_store
from finetune.testing import contract
from finetune.testing.cases import Case, find_cases
from finetune.training.session import Session

LAYERS = 4
FEW = ("q", "down")  # two matrices per block are enough, and fast
BOTH: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(rank=2, targets=FEW),
    "shira": lambda: SHiRA(sparsity=0.9, targets=FEW),
}
MORE: dict[str, Callable[[], Method]] = {
    **BOTH,
    "lora dropout": lambda: LoRA(rank=2, dropout=0.2, targets=FEW),
    "snell": lambda: SNELL(rank=4, sparsity=0.9, targets=FEW),
    "snell dropout": lambda: SNELL(rank=4, sparsity=0.5, dropout=0.1, drop_path=0.1, targets=FEW),
    "shira drop_grow": lambda: SHiRA(sparsity=0.9, schedule=DropGrow(every=2, rate=0.3), targets=FEW),
    "shira redraw": lambda: SHiRA(sparsity=0.9, schedule=Redraw(every=3), targets=FEW),
}
both = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def vit(layers: int = LAYERS) -> Any:
    torch.manual_seed(7)
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 8,
    }
    t: Any = transformers
    return t.ViTForImageClassification(t.ViTConfig(**sizes, num_hidden_layers=layers, num_labels=3)).eval()


def begin(
    method: Method,
    selector: Selector | None,
    steps: int = 12,
    layers: int = LAYERS,
    seed: int = 0,
    **train: Any,
) -> Session:
    session = contract.begin(
        method,
        train=replace(contract.TRAIN, steps=steps, **train),
        model=vit(layers),
        selector=selector,
        seed=seed,
    )
    for group in session.optimizer.param_groups:
        group["weight_decay"] = 0.1
    return session


def state_of(session: Session) -> ScoredBlocks:
    state = session.states["selector"]
    assert isinstance(state, ScoredBlocks)
    return state


def holdings(session: Session) -> dict[int, dict[str, Tensor]]:
    """Copy everything that training moves in each block: values, and moments (0 if there are none yet).

    The blocks are found without the selector.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, layer in patched(session.model).items():
        block = found.setdefault(int(re.findall(r"\d+", name)[0]), {})
        for delta in layer.deltas:
            bounds = delta.bank.bounds() if isinstance(delta, SparseDelta) else []
            owned = [delta.bank.values] if isinstance(delta, SparseDelta) else list(delta.parameters())
            for j, parameter in enumerate(owned):
                part = (
                    slice(bounds[delta.i], bounds[delta.i + 1])
                    if isinstance(delta, SparseDelta)
                    else slice(None)
                )
                state = session.optimizer.state.get(parameter, {})
                tensors = {
                    "value": parameter.detach(),
                    **{k: state.get(k, torch.zeros_like(parameter)) for k in ("exp_avg", "exp_avg_sq")},
                }
                block |= {f"{name} {j} {key}": t[part].clone() for key, t in tensors.items()}
                if not isinstance(delta, SparseDelta):
                    block[f"{name} {j} step"] = torch.as_tensor(state.get("step", 0.0)).clone()
    return found


def gates(session: Session) -> dict[int, set[float]]:
    found: dict[int, set[float]] = {}
    for name, layer in patched(session.model).items():
        found.setdefault(int(re.findall(r"\d+", name)[0]), set()).update(delta.gate for delta in layer.deltas)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[key]) for key, t in a.items())


def set_step(session: Session, step: int) -> None:
    """Set the run to the state before ``step``."""
    session.run.step, session.run.batch = step, next(session.batches.steps(step, step + 1))
    session.run.metrics = {}


def shake(session: Session, size: float = 0.3) -> None:
    """Give every delta a random change, as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    for parameter in session.states["method"].parameters():
        parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", MORE.values(), ids=MORE)
def test_a_quarter_trains_and_the_rest_does_not_move_at_all(make: Callable[[], Method]) -> None:
    """Frozen blocks keep their bits, moments included, under weight decay; the head trains in every step."""
    session = begin(make(), IST(every=2), steps=5)
    real, seen = session.optimizer.step, list[list[int]]()

    def step() -> None:
        state, before = state_of(session), holdings(session)
        for block, deltas in state.parts.items():
            for parameter in (p for d in deltas for p in d.parameters()):
                assert parameter.requires_grad == (block in state.chosen)
                assert (parameter.grad is not None) == (block in state.chosen)
            for delta in deltas:
                if isinstance(delta, SparseDelta):
                    a, b = delta.bank.bounds()[delta.i : delta.i + 2]
                    assert bool(delta.bank.values.grad[a:b].any()) == (block in state.chosen)  # type: ignore
        assert all(p.grad is not None for p in session.states["head"].parameters())
        assert all(p.grad is None for p in session.model.parameters() if not p.requires_grad)
        real()
        kept.append((before, list(state.chosen)))

    kept: list[tuple[dict[int, dict[str, Tensor]], list[int]]] = []
    session.optimizer.step = step
    for _ in session.steps():
        (before, chosen), after = kept.pop(), holdings(session)
        assert len(chosen) == 1
        for block in range(LAYERS):
            assert same(before[block], after[block]) == (block not in chosen), block
        assert all(p.requires_grad for p in session.states.parameters())
        assert not any(
            any(delta.bank.frozen)
            for found in state_of(session).parts.values()
            for delta in found
            if isinstance(delta, SparseDelta)
        )
        seen.append(chosen)
    assert len({tuple(chosen) for chosen in seen}) > 1


@pytest.mark.parametrize(
    ("layers", "share", "expected"),
    [(1, 0.25, 1), (2, 0.25, 1), (3, 0.25, 1), (8, 0.25, 2), (9, 0.25, 2), (100, 0.29, 29), (8, 1.0, 8)],
)
def test_the_count_is_rounded_down_and_at_least_one(layers: int, share: float, expected: int) -> None:
    assert IST().count_blocks(share, ScoredBlocks({block: [] for block in range(layers)})) == expected


@pytest.mark.parametrize("layers", [1, 2, 3])
@both
def test_few_layers_neither_fail_nor_hang(make: Callable[[], Method], layers: int) -> None:
    """Of two layers there are two sets to damp, fewer than the default; a single layer is never probed."""
    session = begin(make(), IST(every=2, damped=0.7), layers=layers, steps=6)
    asked: list[Any] = []
    real = session.run.evaluate
    session.run.evaluate = lambda batch: (asked.append(batch), real(batch))[1]
    contract.finish(session)
    assert len(asked) == {1: 0, 2: 2, 3: 3}[layers] * 2


@both
def test_probes_damp_distinct_halves_and_restore_every_gate(make: Callable[[], Method]) -> None:
    """Gates and outputs are restored to the bit."""
    session = begin(make(), IST(), steps=30)
    session.start()
    shake(session)
    odd = 0.1 + 0.2
    for delta in next(iter(patched(session.model).values())).deltas:
        delta.gate = odd
    before, outputs, seen = gates(session), contract.logits(session.tuned), []
    real = session.run.evaluate

    def evaluate(batch: Any) -> Tensor:
        assert not torch.is_grad_enabled() or not real(batch).requires_grad
        seen.append(gates(session))
        return real(batch)

    session.run.evaluate = evaluate
    set_step(session, 10)
    session.tuned.train()
    session.selector.before_step(session.run, state_of(session))
    assert session.model.training
    session.selector.after_step(session.run, state_of(session))
    damped = [{block for block in range(LAYERS) if found[block] != before[block]} for found in seen]
    assert [len(blocks) for blocks in damped] == [2, 2, 2]
    assert len({frozenset(blocks) for blocks in damped}) == 3
    for found, blocks in zip(seen, damped, strict=True):
        assert all(found[block] == {gate * 0.25 for gate in before[block]} for block in blocks)
    assert gates(session) == before
    assert torch.equal(contract.logits(session.tuned), outputs)


@both
def test_a_failing_probe_leaves_the_gates_as_they_were(make: Callable[[], Method]) -> None:
    session = begin(make(), IST())
    session.start()

    def evaluate(batch: Any) -> Tensor:
        raise KeyboardInterrupt

    session.run.evaluate = evaluate
    set_step(session, 10)
    with pytest.raises(KeyboardInterrupt):
        session.selector.before_step(session.run, state_of(session))
    assert set().union(*gates(session).values()) == {1.0}


@pytest.mark.parametrize("micro", [None, 3])
@both
def test_a_probe_measures_the_steps_batch_on_the_damped_weights(
    make: Callable[[], Method], micro: int | None
) -> None:
    """Compare losses with plain layers whose damped blocks hold w + factor * change, and scores with the
    formula."""
    session = begin(make(), IST(), steps=30, micro_batch_size=micro)
    session.start()
    shake(session)
    set_step(session, 10)
    probes: list[tuple[set[int], float]] = []
    real = session.run.evaluate

    def evaluate(batch: Any) -> Tensor:
        probes.append(({b for b, found in gates(session).items() if found != {1.0}}, float(real(batch))))
        return real(batch)

    session.run.evaluate = evaluate
    session.selector.before_step(session.run, state_of(session))
    session.selector.after_step(session.run, state_of(session))
    rows = [i for b in session.run.batch for i in b.ids]
    batch, plain = collate([session.batches.data[int(i)] for i in rows]), vit()
    assert len(rows) == 8
    plain.classifier.load_state_dict(session.model.classifier.state_dict())
    expected = []
    for damped, loss in probes:
        for name, layer in patched(session.model).items():
            factor = 0.25 if int(re.findall(r"\d+", name)[0]) in damped else 1.0
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(
                    layer.original + factor * sum(d(layer.original) for d in layer.deltas)
                )
        with torch.no_grad():
            expected.append(float(nn.functional.cross_entropy(plain(**batch.inputs).logits, batch.labels)))
        assert loss == pytest.approx(expected[-1], abs=1e-5)
    rewards = [math.exp(-loss) for _, loss in probes]
    mean = sum(rewards) / 3
    change = [
        sum(10 * 0.25 * (r - mean) for r, (damped, _) in zip(rewards, probes, strict=True) if block in damped)
        for block in range(LAYERS)
    ]
    assert state_of(session).scores.tolist() == pytest.approx(change, abs=1e-9)
    assert max(map(abs, change)) > 1e-4
    assert session.run.metrics == {
        f"score_{block}": score for block, score in enumerate(state_of(session).scores.tolist())
    }


def test_scores_by_hand() -> None:
    """The rewards 1/2, 1/4 and 1 have the mean 7/12."""
    losses = [math.log(2), math.log(4), 0.0]
    change = IST().score_changes(torch.zeros(4, dtype=torch.float64), [[0, 1], [1, 2], [0, 3]], losses)
    assert change.tolist() == pytest.approx([5 / 6, -25 / 24, -5 / 6, 25 / 24])
    p = 1 / (1 + math.exp(-1.5))
    moved = IST(rate=3.0, reward="loss").score_changes(
        torch.tensor([1.5, -0.5]).double(), [[0], [1]], [2.0, 1.0]
    )
    assert moved[0].item() == pytest.approx(3 * -0.5 * p * (1 - p))


@pytest.mark.parametrize("reward", ["exp", "loss"])
def test_scores_keep_to_their_bounds(reward: Any) -> None:
    """Centred rewards sum to 0, equal losses change nothing, and advantages bound the change of a score."""
    selector, generator = IST(reward=reward), torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randn(6, generator=generator, dtype=torch.float64)
        sets = [torch.randperm(6, generator=generator)[:3].tolist() for _ in range(3)]
        losses = torch.rand(3, generator=generator).mul(4).tolist()
        change = selector.score_changes(scores, sets, losses)
        rewards = [math.exp(-loss) if reward == "exp" else -loss for loss in losses]
        advantages = [r - sum(rewards) / 3 for r in rewards]
        assert bool((change.abs() <= 10 * 0.25 * sum(map(abs, advantages)) + 1e-12).all())
        everywhere = selector.score_changes(scores, [list(range(6))] * 3, losses)
        torch.testing.assert_close(everywhere, torch.zeros(6, dtype=torch.float64))
        assert not selector.score_changes(scores, sets, [losses[0]] * 3).any()
        untouched = [i for i in range(6) if not any(i in s for s in sets)]
        assert not change[untouched].any()


@both
def test_until_the_first_probe_it_is_rst(make: Callable[[], Method]) -> None:
    """The draws are the same, hence the bits."""
    ist, rst = begin(make(), IST(every=3), steps=6), begin(make(), IST(probes=0), steps=6)
    for one, other in zip(ist.steps(), rst.steps(), strict=True):
        if one.number <= 3:
            assert state_of(ist).chosen == state_of(rst).chosen
            contract.same_values(ist.states["method"], rst.states["method"])
            assert one.loss == other.loss
            assert not state_of(ist).scores.any()
    assert state_of(ist).scores.any()
    assert not state_of(rst).scores.any()
    with pytest.raises(AssertionError):
        contract.same_values(ist.states["method"], rst.states["method"])


def test_draws_follow_the_weights() -> None:
    """Without scores draws are uniform (RST); with scores a block's share is that of its sigmoid(-s)."""
    generator, state = torch.Generator().manual_seed(0), ScoredBlocks({3 + b: [] for b in range(8)})
    pairs = Counter(tuple(state.draw(torch.sigmoid(-state.scores), 2, generator)) for _ in range(5600))
    assert len(pairs) == 28
    assert (
        sum((n - 200) ** 2 / 200 for n in pairs.values()) < 55.5
    )  # chi-square with 27 degrees of freedom, p = 0.001
    state.scores += torch.linspace(-2, 3, 8)
    singles = Counter(state.draw(torch.sigmoid(-state.scores), 1, generator)[0] for _ in range(8000))
    weights = [1 / (1 + math.exp(s)) for s in torch.linspace(-2, 3, 8).tolist()]
    expected = {3 + b: 8000 * w / sum(weights) for b, w in enumerate(weights)}
    assert sum((singles[b] - n) ** 2 / n for b, n in expected.items()) < 24.3  # 7 degrees


def test_low_scores_train_and_high_scores_are_damped() -> None:
    """A score means unimportance: weights are sigmoid(-s) to train and sigmoid(s) to damp."""
    session = begin(BOTH["lora"](), IST(damped=0.25), steps=30)
    session.start()
    state, damped = state_of(session), list[int]()
    state.scores.copy_(torch.tensor([9.0, 9.0, -9.0, 9.0]))
    for _ in range(20):
        set_step(session, 0)
        session.selector.before_step(session.run, state)
        session.selector.after_step(session.run, state)
        assert state.chosen == [2]
    state.scores.div_(-2)
    session.run.evaluate = lambda batch: (
        damped.extend(b for b, found in gates(session).items() if found != {1.0}),
        torch.tensor(1.0),
    )[1]
    set_step(session, 10)
    session.selector.before_step(session.run, state)
    assert damped[0] == 2
    assert len(set(damped)) == 3


def test_extreme_scores_neither_fail_nor_hang() -> None:
    """A weight of 0 would make the draw fail, and a set that is never drawn would make it wait forever."""
    session = begin(LoRA(rank=2), IST(every=1), layers=2, steps=3)
    state_of(session).scores += torch.tensor([5000.0, -5000.0])
    contract.finish(session)
    assert state_of(session).scores.isfinite().all()


def test_damping_a_change_of_zero_does_nothing() -> None:
    """LoRA starts with B = 0."""
    session = begin(LoRA(rank=2), IST(), steps=30)
    session.start()
    set_step(session, 10)
    session.selector.before_step(session.run, state_of(session))
    assert not state_of(session).scores.any()
    session.selector.after_step(session.run, state_of(session))
    shake(session)
    for delta in state_of(session).parts[3]:
        delta.get_parameter("b").data.zero_()
    found = []
    for gate in (1.0, 0.25):
        for delta in state_of(session).parts[3]:
            delta.gate = gate
        found.append(session.run.evaluate(session.run.batch))
    assert torch.equal(*found)


@pytest.mark.parametrize("case", ["lora dropout", "shira", "shira redraw"])
def test_all_blocks_without_probes_is_the_plain_run(case: str) -> None:
    """The runs agree to the bit, and so do the method's own draws."""
    make = MORE[case]
    plain, all_of_it, none = (
        contract.finish(begin(make(), selector, steps=4))
        for selector in (None, IST(trained=1.0, probes=0), NoSelector())
    )
    contract.same_values(plain.states, none.states)
    for key in ("head", "method"):
        contract.same_values(plain.states[key], all_of_it.states[key])


@both
def test_a_planted_block_ends_with_the_lowest_score_and_trains_most(make: Callable[[], Method]) -> None:
    """The labels are the model's predictions with the change of one block; the changes of the others are
    small."""
    session, planted = begin(make(), IST(every=1)), 2
    session.start()
    for block, deltas in state_of(session).parts.items():
        for delta in deltas:
            generator = torch.Generator().manual_seed(block)
            for t in delta.inputs():
                t.data.copy_((1.5 if block == planted else 0.01) * torch.randn(t.shape, generator=generator))
    head: Any = session.states["head"]
    data: Any = session.batches.data
    with torch.no_grad():
        logits = session.tuned(**collate(data).inputs).logits
        head.trained()["classifier.weight"].mul_(20 / logits.std(0).min())
        head.trained()["classifier.bias"].sub_(logits.mean(0) * 20 / logits.std(0).min())
        said = session.tuned(**collate(data).inputs).logits.argmax(-1)
    assert len(said.unique()) == 3
    for item, label in zip(data, said.tolist(), strict=True):
        item["label"] = label
    state, session.run.batch = state_of(session), [collate(data)]
    for step in range(1, 31):
        session.run.step = step
        session.selector.before_step(session.run, state)
        session.selector.after_step(session.run, state)
    trained = Counter(
        b for _ in range(4000) for b in state.draw(torch.sigmoid(-state.scores), 1, session.run.generator)
    )
    assert int(state.scores.argmin()) == planted
    assert state.scores[planted] < state.scores[torch.arange(LAYERS) != planted].min() - 1
    assert trained.most_common(1)[0][0] == planted


@pytest.mark.parametrize("case", ["lora dropout", "shira", "shira drop_grow"])
def test_resumes_to_the_bit(case: str, tmp_path: Path) -> None:
    selector, steps = IST(every=3), 8
    whole, losses, scores = begin(MORE[case](), selector, steps), [], []
    for step in whole.steps():
        losses.append(step.loss)
        scores.append(state_of(whole).scores.clone())
        checkpoint.save(tmp_path / str(step.number), whole, {})
    assert scores[-1].any()
    for at in (3, 5):
        resumed = begin(MORE[case](), selector, steps)
        checkpoint.load(tmp_path / str(at), resumed)
        assert torch.equal(state_of(resumed).scores, scores[at - 1])
        assert [step.loss for step in resumed.steps()] == losses[at:]
        contract.same_values(resumed.states, whole.states)


CASES = find_cases(Path(__file__).parents[1] / "methods")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_every_method_is_selected_from_or_refused(case: Case) -> None:
    begin = functools.partial(contract.begin, case.make(), optimizer=case.optimizer, selector=IST(every=2))
    if not case.selectable:
        with pytest.raises(ConfigError, match=r"trained in place|selector=ist "):
            begin()
        return
    session = contract.finish(begin(train=replace(contract.TRAIN, steps=3)))
    assert len(state_of(session).scores) == 2
    assert state_of(session).scores.isfinite().all()


@both
def test_the_stored_change_holds_no_state_of_the_selector(make: Callable[[], Method], tmp_path: Path) -> None:
    trained, plain, selected = (
        contract.finish(begin(make(), IST(every=2), 3)),
        begin(make(), None),
        begin(make(), IST(every=4)),
    )
    assert not [name for name in tensors_to_store(trained.states) if "selector" in name or "score" in name]
    save_delta(tmp_path / "delta", trained.states, {})
    for new in (plain, selected):
        load_delta(tmp_path / "delta", new.states)
        assert torch.equal(contract.logits(new.tuned), contract.logits(trained.tuned))


@both
def test_frozen_blocks_save_no_activations(make: Callable[[], Method]) -> None:
    """If only the last block trains, the blocks below save nothing for backward."""
    kept = {}
    for name, chosen in {"all": list(range(LAYERS)), "last": [LAYERS - 1], "first": [0]}.items():
        session = begin(make(), IST(probes=0))
        session.start()
        session.tuned.train()
        set_step(session, 0)
        state = state_of(session)
        state.draw = lambda weights, count, generator, chosen=chosen: chosen  # type: ignore
        session.selector.before_step(session.run, state)
        storages: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in session.tuned.parameters()}

        def note(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = session.tuned(**session.run.batch[0].inputs).logits
        kept[name] = sum(size for place, size in storages.items() if place not in weights)
        del out
    assert kept["last"] < kept["all"] / LAYERS * 1.5
    assert kept["first"] < kept["all"]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("gpt2", LoRA(rank=2)),
        ("gpt2", SHiRA(sparsity=0.9)),
        ("llama", LoRA(rank=2)),
        ("llama", SHiRA(sparsity=0.9)),
    ],
)
def test_language_models(kind: Any, method: Method) -> None:
    session = contract.finish(contract.begin(method, kind, selector=IST(every=2)))
    assert state_of(session).scores.any()
    assert list(state_of(session).parts) == [0, 1]


@both
def test_half_precision(make: Callable[[], Method]) -> None:
    """Probes run under autocast too; the model's own tensors are bfloat16."""
    train = replace(contract.TRAIN, precision="bf16")
    session = contract.finish(
        contract.begin(make(), train=train, model=vit().bfloat16(), selector=IST(every=2))
    )
    assert state_of(session).scores.any()
    assert state_of(session).scores.isfinite().all()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Full(), r"selector=ist damps .*vit.layers.0.* is trained in place.* Choose .*method=lora"),
        (BitFit(), "is trained in place"),
        (Head(), "changes no linear layer in one"),
        (Peft(config={"r": 2}), "an adapter of peft \\(LORA\\) is not tied to one"),
        (LoRA(targets=("vit.pooler.dense",)), "matches no linear layer"),
    ],
)
def test_methods_that_cannot_be_selected_by_block_are_refused(method: Method, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(method, IST())


def test_parts_outside_the_blocks_always_train() -> None:
    """The class token of SNELL, and a layer with no number in its name, are outside."""
    model = vit(4)
    model.vit.bridge = nn.Linear(16, 16)
    session = contract.begin(
        SNELL(rank=4, targets=("all", "bridge")), model=copy.deepcopy(model), selector=IST(probes=0)
    )
    state = state_of(session)
    assert list(state.parts) == [0, 1, 2, 3]
    set_step(session, 0)
    session.selector.before_step(session.run, state)
    resting = {name for name, p in session.states.named_parameters() if not p.requires_grad}
    assert len(resting) == 3 * 6 * 2
    assert not [name for name in resting if "bridge" in name or "cls" in name or "classifier" in name]


def test_settings_without_effect_are_refused() -> None:
    assert not IST().faults(11)
    assert not IST(probes=0).faults(1)
    (fault,) = IST().faults(10)
    assert fault.startswith("selector.every=10 ")
    (fault,) = IST(probes=1).faults(100)
    assert fault.startswith("selector.probes=1")
