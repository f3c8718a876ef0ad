"""Test SpIEL.

The oracles are a dense float64 model whose entries, moments and candidates are masks, autograd, and full
fine-tuning.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.core.attach import patched
from finetune.core.sparse.bank import Bank
from finetune.core.sparse.candidates import Candidates
from finetune.errors import ConfigError
from finetune.methods.sparse.spiel import SpIEL, exchange_entries
from finetune.optim.adamw import AdamW
from finetune.optim.sm3 import SM3
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.static import Static
from finetune.selectors.ist import IST
from finetune.storage import checkpoint
from finetune.storage.delta import tensors_to_store
from finetune.testing import contract, sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.testing.sessions import Kind
from finetune.training.session import Session, rate

CASES = [
    Case(
        "spiel",
        lambda: SpIEL(sparsity=0.9, schedule=DropGrow(every=3), window=2),
        ("vit", "gpt2"),
        data_dependent=True,
        settings=("schedule.every=2", "method.window=1"),
    ),
    # The contract resumes after steps 1, 3 and 5 of 6: in the first window, between two, before a move.
    # GPT-2 stores its weights transposed.
    Case(
        "spiel ma",
        lambda: SpIEL(criterion="ma", sparsity=0.9, schedule=DropGrow(every=3), window=2),
        ("vit", "gpt2"),
        SM3(lr=1e-2),
        data_dependent=True,
    ),
]

PUBLISHED = Published(
    "arXiv 2401.16405: the defaults of the released code",
    {
        "sparsity": 0.99,
        "score": "random",
        "scope": "matrix",
        "criterion": "ag",
        "schedule": DropGrow(every=20, rate=0.2, decay="linear", dropped="base"),
        "window": 5,
        "decay": "base",
    },
    {"sparsity": (0.98, "the share that all sparse methods here have by default")},
)

test_contract = contract_test(CASES)

CRITERIA = ("ag", "ma")
LR = 1e-2


@pytest.fixture(autouse=True)
def optimizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return SM3 for the criterion ma, else AdamW."""
    criterion = getattr(request.node, "callspec", None) and request.node.callspec.params.get("criterion")
    monkeypatch.setattr(sessions, "OPTIMIZER", (SM3 if criterion == "ma" else AdamW)(lr=LR))


def made(
    criterion: Any = "ag", sparsity: float = 0.9, targets: tuple[str, ...] = ("all",), **moves: Any
) -> SpIEL:
    """Return a method that moves before the steps 2 and 5 of 6."""
    return SpIEL(
        targets, criterion=criterion, sparsity=sparsity, schedule=DropGrow(every=3, **moves), window=2
    )


def places(bank: Bank) -> list[Tensor]:
    return [bank.positions(i).clone() for i in range(len(bank.sizes))]


def dense(bank: Bank, values: Tensor) -> list[Tensor]:
    """Scatter one of the bank's tensors over each whole weight."""
    found = [torch.zeros(size, dtype=values.dtype) for size in bank.sizes]
    for i, (a, b) in enumerate(zip(bank.bounds(), bank.bounds()[1:], strict=False)):
        found[i][bank.positions(i).long()] = values[a:b]
    return found


def before_move(method: SpIEL, step: int, kind: Kind = "vit") -> tuple[Session, Bank, Callable[[], None]]:
    """Return a session after ``step`` steps, and a function that makes the move that is due then."""
    session = contract.begin(method, kind)
    steps = session.steps()
    for _ in range(step):
        next(steps)
    session.run.step = step
    state = session.states["method"]
    return session, state["bank"], lambda: session.current.before_step(session.run, state)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_at_the_start_the_output_is_the_base_s_to_the_bit(criterion: str) -> None:
    session = contract.begin(made(criterion))
    session.start()
    assert torch.equal(contract.logits(session.tuned), contract.logits(contract.tiny()))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("sparsity", "scope"), [(0.4, "matrix"), (0.9, "model")])
def test_every_matrix_keeps_its_count_of_distinct_entries(
    criterion: str, sparsity: float, scope: Any
) -> None:
    """The first choice may give matrices different counts."""
    session = contract.begin(replace(made(criterion, sparsity), scope=scope))
    session.start()
    bank, moved = session.states["method"]["bank"], 0
    first = places(bank)
    for _ in session.steps():
        for now, before in zip(places(bank), first, strict=True):
            assert len(now) == len(before)
            assert bool((now.diff() > 0).all())
        moved += sum(not torch.equal(a, b) for a, b in zip(places(bank), first, strict=True))
    assert moved


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("step", [2, 5])
def test_a_move_changes_the_weights_only_where_entries_are_dropped(criterion: str, step: int) -> None:
    session, bank, move = before_move(made(criterion, rate=0.9), step)
    layers = list(patched(session.model).values())
    before, old, values = (
        [layer.weight.clone() for layer in layers],
        places(bank),
        [bank.slice(i).detach().clone() for i in range(len(bank.sizes))],
    )
    move()
    for i, layer in enumerate(layers):
        stays = torch.isin(old[i], bank.positions(i))
        dropped = old[i][~stays].long()
        expected = (
            before[i].flatten().index_copy(0, dropped, layer.original.reshape(-1)[dropped]).view_as(before[i])
        )
        assert torch.equal(layer.weight, expected)
        assert bool((values[i][stays] != 0).any()) or criterion == "ma" or step == 2
        grown = bank.slice(i)[~torch.isin(bank.positions(i), old[i])]
        assert not grown.any()
        assert len(grown) == len(dropped) > 0
        n = len(old[i]) if step == 2 else int(0.9 * (1 - 5 / 6) * len(old[i]))
        kept = values[i].abs().sort().values[n:]
        assert float(values[i][~stays].abs().max()) <= (float(kept.min()) if len(kept) else float("inf"))
        assert torch.equal(bank.slice(i)[torch.isin(bank.positions(i), old[i])], values[i][stays])


def first_gradients(session: Session) -> dict[str, Tensor]:
    """Return the gradient of the first micro-batch's share of the loss, by autograd on a plain model."""
    plain = contract.tiny().train()
    micro = next(session.batches.steps(0, 1))
    F.cross_entropy(plain(**micro[0].inputs).logits, micro[0].labels).backward()  # type: ignore[union-attr]
    return {name: plain.get_submodule(name).weight.grad for name in patched(session.model)}


@pytest.mark.parametrize("micro", [None, 3])
def test_after_the_first_move_the_entries_are_the_candidates(micro: int | None) -> None:
    """The candidates have the largest gradients of the first micro-batch."""
    session = contract.begin(made(), train=replace(contract.TRAIN, micro_batch_size=micro))
    steps = session.steps()
    for _ in range(3):
        next(steps)
    bank = session.states["method"]["bank"]
    for i, (name, grad) in enumerate(first_gradients(session).items()):
        k = len(bank.positions(i))
        assert torch.equal(bank.positions(i).long(), grad.abs().flatten().topk(k).indices.sort().values), name


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_share_of_later_swaps_falls_linearly(criterion: str) -> None:
    """The first move exchanges all, later ones rate * (1 - step / steps), rounded down; only linear decay
    begins so."""
    method = SpIEL(
        ("q", "down"), criterion=criterion, sparsity=0.7, schedule=DropGrow(every=2, rate=0.8), window=1
    )  # type: ignore[arg-type]
    for decay, shares in (
        ("linear", {1: 1.0, 3: 0.4, 5: 0.8 / 6}),
        ("constant", {1: 0.8, 3: 0.8, 5: 0.8}),
        ("cosine", {3: 0.4}),
    ):
        session = contract.begin(replace(method, schedule=replace(method.schedule, decay=decay)))
        bank, before = session.states["method"]["bank"], []
        for step in session.steps():
            if step.number - 1 in shares:
                share = shares[step.number - 1]
                gone = [int((~torch.isin(a, b)).sum()) for a, b in zip(before, places(bank), strict=True)]
                counts = [int(share * len(a) + 1e-9) for a in before]
                if criterion == "ma":
                    assert gone == [
                        min(n, size - len(a)) for n, a, size in zip(counts, before, bank.sizes, strict=True)
                    ]
                else:
                    assert all(found <= n for found, n in zip(gone, counts, strict=True))
                    assert sum(gone) > 0.3 * sum(counts)
            before = places(bank)


def test_an_entry_that_leaves_and_comes_in_stays_and_few_candidates_replace_the_smallest() -> None:
    where, change = torch.tensor([2, 5, 7, 8, 9]), torch.tensor([0.3, -0.1, 0.2, 0.5, -0.4])

    def grow(*index: int) -> Callable[[Tensor, int], Tensor]:
        return lambda kept, n: torch.tensor([i for i in index if i not in kept][:n])

    assert exchange_entries(where, change, 0.6, grow(1, 3, 4)).tolist() == [1, 3, 4, 8, 9]  # 5, 7 and 2 go
    assert exchange_entries(where, change, 0.6, grow(8, 1, 5, 3)).tolist() == [
        1,
        3,
        5,
        8,
        9,
    ]  # 8 is kept anyway; 5 goes and comes
    assert exchange_entries(where, change, 0.6, grow(1)).tolist() == [1, 2, 7, 8, 9]  # only 5, the smallest
    assert exchange_entries(where, change, 0.6, grow(5, 1)).tolist() == [
        1,
        2,
        5,
        8,
        9,
    ]  # one new one: 7 goes, as 5 comes back
    assert exchange_entries(where, change, 0.6, grow()).tolist() == where.tolist()
    assert exchange_entries(where, change, 0.59, grow(1, 3, 4)).tolist() == [1, 2, 3, 8, 9]
    assert exchange_entries(where, change, 1.0, grow(6, 0, 1, 3, 4)).tolist() == [0, 1, 3, 4, 6]


def test_gradients_are_the_dense_ones_gathered_also_while_they_are_watched() -> None:
    """The gradient passed to the layer below includes the change."""
    found = []
    for watched in (False, True):
        session, bank, _ = before_move(made(sparsity=0.5), 3)
        session.model.double()
        session.states.double()
        x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        bank.watch = (lambda i, grad: False) if watched else None
        F.cross_entropy(session.tuned(pixel_values=x).logits, torch.arange(4) % 3).backward()
        found.append(bank.values.grad)
    plain = copy.deepcopy(contract.tiny().double())
    plain.classifier.load_state_dict(session.model.classifier.state_dict())
    for name, layer in patched(session.model).items():
        plain.get_submodule(name).weight.data.copy_(layer.weight)
    F.cross_entropy(plain(pixel_values=x).logits, torch.arange(4) % 3).backward()
    for i, name in enumerate(patched(session.model)):
        wanted = plain.get_submodule(name).weight.grad.view(-1)[bank.positions(i).long()]
        for grad in found:
            torch.testing.assert_close(
                grad[bank.bounds()[i] : bank.bounds()[i + 1]], wanted, rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_with_all_entries_it_is_full_fine_tuning(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with torch's AdamW on plain matrices; nothing can be exchanged, and each entry is as old as the
    run."""
    monkeypatch.setattr(sessions, "OPTIMIZER", AdamW(lr=LR))
    model = contract.tiny(kind).double()
    session = contract.begin(made(sparsity=0.0), kind, model=model)
    session.states.double()
    plain = contract.tiny(kind).double().train().requires_grad_(False)
    for module in (*plain.modules(), *session.model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = [plain.get_submodule(name).weight for name in patched(session.model)] + (
        list(plain.classifier.parameters()) if kind == "vit" else []
    )
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in trained], weight_decay=0.0)
    for step, (micro, _) in enumerate(
        zip(session.batches.steps(0, contract.STEPS), session.steps(), strict=True)
    ):
        batch = micro[0]
        assert batch
        logits = plain(**batch.inputs).logits
        labels = batch.labels if kind == "vit" else batch.labels[:, 1:]
        optimizer.zero_grad()
        F.cross_entropy(
            *((logits, labels) if kind == "vit" else (logits[:, :-1].flatten(0, 1), labels.flatten()))
        ).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = LR * rate(sessions.OPTIMIZER, step, contract.STEPS)
        optimizer.step()
        for name, layer in patched(session.model).items():
            weight = plain.get_submodule(name).weight
            torch.testing.assert_close(
                layer.weight, weight.T if layer.transposed else weight, rtol=1e-6, atol=1e-7
            )
    bank = session.states["method"]["bank"]
    assert session.optimizer.state[bank.values]["step"].unique().tolist() == [contract.STEPS]


class Dense:
    """SpIEL-AG of one site with whole matrices and masks.

    Change, moments, ages and candidates are [out, in] tensors, and sets are chosen in plain Python.
    """

    def __init__(self, size: int, active: Tensor) -> None:
        self.active = torch.zeros(size, dtype=torch.bool).index_fill(0, active.long(), True)
        self.change, self.m, self.v, self.age = (torch.zeros(size, dtype=torch.float64) for _ in range(4))
        self.candidates: list[int] = []

    def open(self, grad: Tensor) -> None:
        k = int(self.active.sum())
        self.candidates = grad.abs().float().argsort(descending=True, stable=True)[:k].tolist()
        self.seen = list[Tensor]()

    def adam(self, grad: Tensor, lr: float, decay: float) -> None:
        a = self.active
        self.age[a] += 1
        self.m[a] = 0.9 * self.m[a] + 0.1 * grad[a]
        self.v[a] = 0.999 * self.v[a] + 0.001 * grad[a] ** 2
        self.change[a] -= lr * decay * self.change[a]
        self.change[a] -= (
            lr
            * (self.m[a] / (1 - 0.9 ** self.age[a]))
            / ((self.v[a] / (1 - 0.999 ** self.age[a])).sqrt() + 1e-8)
        )

    def select(self, share: float) -> None:
        active = self.active.nonzero().view(-1).tolist()
        n = int(share * len(active))
        offered = sorted(active, key=lambda i: abs(float(self.change[i])))[:n]
        sums = torch.stack(self.seen).sum(0)
        free = [i for i in self.candidates if i not in set(active) - set(offered)]
        grown = sorted(free, key=lambda i: -abs(float(sums[i])))[:n]
        new = [i for i in grown if i not in offered]
        for i in [i for i in offered if i not in grown][: len(new)]:
            self.active[i] = False
            self.change[i] = self.m[i] = self.v[i] = self.age[i] = 0
        for i in new:
            self.active[i] = True
            g = torch.stack([seen[i] for seen in self.seen])
            self.age[i] = len(g)
            self.m[i] = g.mean() * (1 - 0.9 ** len(g))
            self.v[i] = (g**2).mean() * (1 - 0.999 ** len(g))


def simulated(
    session: Session, sites: dict[str, Dense], every: int, window: int, share: float, decay: float
) -> Iterator[None]:
    """Train the plain model beside the session, one step at a time, and yield after each step."""
    plain, total = contract.tiny().double().train(), contract.STEPS
    base = {name: plain.get_submodule(name).weight.detach().flatten().clone() for name in sites}
    head = torch.optim.AdamW(
        [
            {"params": [plain.classifier.weight], "weight_decay": decay},
            {"params": [plain.classifier.bias], "weight_decay": 0.0},
        ],
        lr=LR,
    )
    for step, micro in enumerate(session.batches.steps(0, total)):
        if step % every == window:
            for site in sites.values():
                site.select(1.0 if step == window else share * (1 - step / total))
        plain.zero_grad()
        counted = sum(len(b.labels) for b in micro if b)
        for part, batch in enumerate(micro):
            assert batch
            for name, site in sites.items():
                weight = plain.get_submodule(name).weight
                weight.data.copy_((base[name] + site.change).view_as(weight))
            (
                F.cross_entropy(plain(**batch.inputs).logits, batch.labels, reduction="sum") / counted
            ).backward()
            for name, site in sites.items():
                if step % every == 0 and part == 0:
                    site.open(plain.get_submodule(name).weight.grad.flatten())
        lr = LR * rate(sessions.OPTIMIZER, step, total)
        for name, site in sites.items():
            grad = plain.get_submodule(name).weight.grad.flatten().clone()
            site.seen.append(grad) if step % every < window else None
            site.adam(grad, lr, decay)
        for group in head.param_groups:
            group["lr"] = lr
        head.step()
        yield


@pytest.mark.parametrize(("micro", "sparsity"), [(None, 0.5), (3, 0.97)])
def test_two_whole_cycles_equal_a_dense_model_with_masks(
    micro: int | None, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates, sums, both moves, seeds, ages and decay: the same entries, and values to 1e-6."""
    monkeypatch.setattr(sessions, "OPTIMIZER", AdamW(lr=LR, weight_decay=0.3))
    train = replace(contract.TRAIN, micro_batch_size=micro, clip=None)
    session = contract.begin(
        made(sparsity=sparsity, targets=("q", "down"), rate=0.9), train=train, model=contract.tiny().double()
    )
    session.start()
    session.states.double()
    bank = session.states["method"]["bank"]
    sites = {name: Dense(bank.sizes[i], bank.positions(i)) for i, name in enumerate(patched(session.model))}
    ages = set[float]()
    for _ in zip(session.steps(), simulated(session, sites, 3, 2, 0.9, 0.3), strict=True):
        of = session.run.moments(bank.values)
        held = {"change": bank.values.detach(), "age": of["step"], "m": of["exp_avg"], "v": of["exp_avg_sq"]}
        for i, site in enumerate(sites.values()):
            assert torch.equal(bank.positions(i).long(), site.active.nonzero().view(-1))
        for name, values in held.items():
            for mine, site in zip(dense(bank, values), sites.values(), strict=True):
                torch.testing.assert_close(mine, getattr(site, name), rtol=1e-6, atol=1e-10)
        ages = {float(age) for site in sites.values() for age in site.age[site.active]}
    assert ages == {3.0, 6.0}, "the last to come had 2 steps before their first"


def test_seeds_are_the_mean_gradients_and_others_keep_their_moments() -> None:
    session, bank, move = before_move(made(rate=0.9), 5)
    candidates = session.states["method"]["candidates"]
    old, found = places(bank), [candidates.at_site(bank, i) for i in range(len(bank.sizes))]
    sums = [dict(zip(index.tolist(), total.tolist(), strict=True)) for index, total, _, _ in found]
    state = session.run.moments(bank.values)
    before = {name: dense(bank, t.clone()) for name, t in state.items()}
    move()
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert len(candidates.index) == 0
    count = 0
    for i in range(len(bank.sizes)):
        new = bank.positions(i)[~torch.isin(bank.positions(i), old[i])].long()
        stayed = bank.positions(i)[torch.isin(bank.positions(i), old[i])].long()
        for name, t in state.items():
            assert torch.equal(dense(bank, t)[i][stayed], before[name][i][stayed])
        age, m = dense(bank, state["step"])[i][new], dense(bank, state["exp_avg"])[i][new]
        assert age.tolist() == [2.0] * len(new)
        torch.testing.assert_close(m / (1 - 0.9**age), torch.tensor([sums[i][j] / 2 for j in new.tolist()]))
        count += len(new)
    assert count


@pytest.mark.parametrize("step", [2, 5])
def test_ma_grows_the_largest_products_of_sm3_s_accumulators(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "OPTIMIZER", SM3(lr=LR))
    session, bank, move = before_move(made("ma", rate=0.9), step)
    state, old, values = (
        session.optimizer.state[bank.values],
        places(bank),
        [bank.slice(i).detach().clone() for i in range(len(bank.sizes))],
    )
    held = {name: t.clone() for name, t in state.items()}
    move()
    assert all(torch.equal(held[name], t) for name, t in state.items()), "accumulators stay"
    for i, shape in enumerate(bank.shapes):
        scores = torch.outer(
            state[f"row.{i}"].view(-1).double(), state[f"col.{i}"].view(-1).double()
        ).flatten()
        n = len(old[i]) if step == 2 else int(0.9 * (1 - 5 / 6) * len(old[i]))
        gone = set(old[i][values[i].abs().argsort(stable=True)[:n]].tolist())
        free = sorted(
            set(range(shape[0] * shape[1])) - set(old[i].tolist()), key=lambda j: (-float(scores[j]), j)
        )
        assert set(bank.positions(i).tolist()) == (set(old[i].tolist()) - gone) | set(free[:n])


def test_between_windows_nothing_is_watched_and_no_candidates_are_stored() -> None:
    session = contract.begin(made())
    state, sizes = session.states["method"], []
    for _ in session.steps():
        assert state["bank"].watch is None
        assert state["candidates"].step_sums is None
        sizes.append(len(state["candidates"].index))
    k = len(state["bank"].values)
    assert sizes == [k, k, 0, k, k, 0]
    assert not [name for name in tensors_to_store(session.states) if "candidates" in name]


def test_a_window_that_would_end_with_the_run_is_not_begun() -> None:
    session = contract.begin(SpIEL(sparsity=0.9, schedule=DropGrow(every=4), window=2))
    sizes = [len(session.states["method"]["candidates"].index) > 0 for _ in session.steps()]
    assert sizes == [True, True, False, False, False, False]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_resumes_to_the_bit_with_micro_batches_and_kept_entries(criterion: str) -> None:
    train = replace(contract.TRAIN, micro_batch_size=3)
    trial = contract.Trial(lambda: made(criterion, targets=("q", "down"), dropped="kept"), train=train)
    contract.check_resume(trial)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_under_ist_frozen_blocks_without_candidates_keep_their_entries(criterion: str) -> None:
    """A block that never trained in a window has no candidates and keeps its entries.

    A block that trained once has that one gradient.
    """
    session = contract.begin(made(criterion), selector=IST(trained=0.5, every=2))
    contract.finish(session)
    bank = session.states["method"]["bank"]
    assert bank.values.isfinite().all()
    if criterion == "ag":
        ages = session.optimizer.state[bank.values]["step"]
        assert 1 < len(ages.unique()) <= contract.STEPS
        assert float(ages.max()) <= contract.STEPS
    assert [len(bank.positions(i)) for i in range(len(bank.sizes))] == [
        size - round(0.9 * size) for size in bank.sizes
    ]


def test_a_checkpoint_between_a_move_and_its_failed_step_resumes(tmp_path: Any) -> None:
    """The checkpoint is saved after the move and before its step: there are no candidates, so nothing moves
    twice."""
    session, bank, move = before_move(made(), 2)
    move()
    checkpoint.save(tmp_path / "c", session, {})
    session.states["method"]["bank"].watch = None
    other = contract.begin(made())
    checkpoint.load(tmp_path / "c", other)
    next(other.steps())
    assert all(
        torch.equal(a, b) for a, b in zip(places(bank), places(other.states["method"]["bank"]), strict=True)
    )


def test_a_scaled_loss_gives_the_same_sums_and_an_overflow_is_no_step() -> None:
    """In fp16 the gradients that are watched are those of the scaled loss."""
    bank = contract.begin(made(targets=("q",))).states["method"]["bank"]
    bank.place([torch.arange(k) for k in (3, 2)])
    size, found = bank.sizes[0], []
    for scale in (1.0, 1024.0):
        run: Any = SimpleNamespace(
            average_or_broadcast=lambda t: t,
            optimizer=SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda scale=scale: scale)),
        )
        candidates = Candidates(2)
        candidates.resize(len(bank.values))
        for step, bad in enumerate((True, False, False)):
            candidates.begin_step(bank)
            x = torch.randn(size, generator=torch.Generator().manual_seed(step)) * (
                float("inf") if bad else scale
            )
            grad: Any = SimpleNamespace(dense=x.view(bank.shapes[0]))
            candidates.add_gradient(run, bank, 0, grad)
            candidates.end_step(run)
        found.append(candidates.at_site(bank, 0))
    first, second = (torch.randn(size, generator=torch.Generator().manual_seed(step)) for step in (1, 2))
    best = first.abs().topk(3).indices.sort().values
    for index, sums, squares, steps in found:
        assert torch.equal(index.long(), best), "the step with overflow chose no candidates"
        torch.testing.assert_close(sums, (first + second)[best])
        torch.testing.assert_close(squares, (first**2 + second**2)[best])
        assert steps == 2
    assert [len(t) for t in candidates.at_site(bank, 1)[:3]] == [0, 0, 0]


def test_what_cannot_mean_anything_is_refused() -> None:
    for fault, settings in {
        "schedule=static does not say when": {"schedule": Static()},
        "method.window=5 must end before its period does; take less than schedule.every=5": {
            "schedule": DropGrow(every=5)
        },
        "method.grain=row: entries are dropped": {"grain": "row"},
        "method.score=change is 0 for every entry": {"score": "change"},
    }.items():
        with pytest.raises(ValueError, match=re.escape(fault)):
            SpIEL(**settings)
    assert not SpIEL().faults(6)
    assert "method.window=5 is not below the run's 5 steps" in SpIEL().faults(5)[0]
    session = contract.begin(made("ma"))
    with pytest.raises(ConfigError, match=r"take optimizer=sm3, or method\.criterion=ag"):
        session.start()
