"""Entries that are held at 0: changes, gradients and steps against closed formulas in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import finetune
from finetune.core.attach import attach, merge, parts
from finetune.core.inplace import InPlace
from finetune.core.lowrank import LowRank
from finetune.core.method import Method
from finetune.core.part import Delta, WeightGrad
from finetune.core.site import Site, find_sites
from finetune.core.sparse.bank import Bank
from finetune.core.sparse.grain import make_grain
from finetune.core.zeros import (
    find_lost_zeros,
    find_pruned,
    fingerprint_zeros,
    hold_zeros,
    layers_with_zeros,
    settle_zeros,
    stored_mask,
)
from finetune.errors import ConfigError
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.amt import Mask
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.snell import SNELL
from finetune.methods.sparse.s2ft import S2FT
from finetune.methods.sparse.sara import SaRA
from finetune.methods.sparse.sparse import Crossing
from finetune.methods.sparse.spiel import SpIEL
from finetune.optim.adamw import AdamW
from finetune.optim.mezo import MeZO
from finetune.optim.sm3 import SM3
from finetune.schedules.one_shot import OneShot
from finetune.testing import contract
from finetune.testing.sessions import TRAIN, begin, finish, logits, tiny, tiny_pruned
from finetune.training.optimizer import make_optimizer


def pruned_layer(out: int = 6, in_: int = 9) -> tuple[nn.Linear, Tensor]:
    """A float64 layer with half of its entries held at 0, and which of its entries are live."""
    torch.manual_seed(0)
    layer = nn.Linear(in_, out, dtype=torch.float64).requires_grad_(False)
    pruned = torch.rand(out, in_) < 0.5
    layer.weight.data.masked_fill_(pruned, 0)
    hold_zeros(layer, pruned)
    return layer, ~pruned


def masked_lora(dropout: float = 0.0) -> tuple[nn.Sequential, LowRank, nn.Linear, Tensor]:
    layer, live = pruned_layer()
    model, delta = nn.Sequential(layer), LowRank((6, 9), 3, 6.0, dropout).double()
    nn.init.normal_(delta.b)
    attach(model, "0", delta)
    return model, delta, layer, live


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_masked_lora_is_the_weight_plus_the_mask_times_the_product(dropout: float) -> None:
    """Output and the gradients of both factors and of the input are those of the formula by autograd."""
    model, delta, layer, live = masked_lora(dropout)
    x = torch.randn(4, 5, 9, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(4, 5, 6, dtype=torch.float64)

    def by_formula() -> Tensor:
        change = live * (2.0 * (delta.b @ delta.a))
        return F.linear(x, layer.weight, layer.bias) + F.linear(F.dropout(x, dropout), change)

    inputs = (x, delta.a, delta.b)
    torch.manual_seed(5)
    expected = by_formula()
    torch.manual_seed(5)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected, inputs, slope)
    for mine, other in zip(torch.autograd.grad(found, inputs, slope), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_masked_lora_merges_to_the_masked_dense_update() -> None:
    model, delta, layer, live = masked_lora()
    before = layer.weight.clone()
    exact = before + live * (2.0 * (delta.b.detach() @ delta.a.detach()))
    patched: Any = model[0]
    torch.testing.assert_close(patched.sum_changes()[0], exact, rtol=0, atol=1e-14)
    assert patched.count_changed() == int(live.sum()) == patched.live
    merge(model, delta)
    torch.testing.assert_close(model[0].weight, exact, rtol=0, atol=1e-14)
    assert not model[0].weight[~live].view(torch.uint8).any()


def test_a_masked_product_has_no_factors_to_offer() -> None:
    _, delta, _, _ = masked_lora()
    assert delta.changes().factors is None
    assert LowRank((6, 9), 3, 6.0, 0.0).changes().factors is not None


DELTAS: dict[str, Callable[[], Delta]] = {
    "lora": lambda: LowRank((6, 9), 2, 4.0, 0.3),
    "snell": lambda: SNELL(rank=4, sparsity=0.5).delta(Site("0", nn.Linear(9, 6), 0, "q", (6, 9))),
    "snell dropout": lambda: SNELL(rank=4, sparsity=0.5, dropout=0.3, drop_path=0.3).delta(
        Site("0", nn.Linear(9, 6), 0, "q", (6, 9))
    ),
    "amt": lambda: Mask((6, 9), 1e-2, 5e-3),
}


@pytest.mark.parametrize("name", DELTAS)
def test_no_output_depends_on_a_pruned_entry(name: str) -> None:
    """An input of one feature gives, in eval and in train mode, only outputs to which live entries lead."""
    layer, live = pruned_layer()
    layer.float()
    layer.bias.data.zero_()
    model, delta = nn.Sequential(layer), DELTAS[name]()
    for parameter in delta.parameters():
        parameter.data.normal_()
    attach(model, "0", delta)
    assert delta.keeps_zeros
    for mode in (True, False):
        model.train(mode)
        delta.train(mode)
        outputs = model(torch.eye(9)).T
        assert not outputs[~live].any()
        assert outputs[live].any()


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.1, weight_decay=0.5), SM3(lr=0.1, weight_decay=0.5)])
def test_steps_in_place_leave_pruned_entries_at_zero(optimizer: Any) -> None:
    """Live entries move as an optimizer moves them whose gradient has zeros; a deep copy does the same."""
    layer, live = pruned_layer()
    layer.float()
    net = nn.Sequential(layer)
    part = InPlace(net, ["0.weight"], keep=True)
    assert part.adapted() == int(live.sum())
    x, y = torch.randn(20, 9), torch.randn(20, 6)
    plain = nn.Parameter(layer.weight.detach().clone())
    copied_net, copied = copy.deepcopy((net, part))
    optimizers = [make_optimizer(nn.ModuleList([each]), optimizer) for each in (part, copied)]
    other = optimizer.make([{"params": [plain], "weight_decay": 0.5}], nn.Module())
    for _ in range(4):
        for model, stepper in zip((net, copied_net), optimizers, strict=True):
            F.mse_loss(model(x), y).backward()
            stepper.step()
            stepper.zero_grad()
        F.mse_loss(F.linear(x, plain, layer.bias), y).backward()
        assert plain.grad is not None
        plain.grad *= live
        other.step()
        other.zero_grad()
    weight = part.trained()["0.weight"].detach()
    assert not weight[~live].view(torch.uint8).any()
    assert (weight[live] != part.original("0.weight")[live]).all()
    assert torch.equal(weight, plain)
    assert torch.equal(copied.trained()["0.weight"], plain)


def test_a_layer_without_zeros_pays_nothing() -> None:
    session = begin(Full(), "llama")
    for part in parts(session.states):
        assert part.count_held() == 0
        assert all(parameter._backward_hooks is None for parameter in part.parameters())
    assert all(stored_mask(module) is None for module in session.model.modules())
    assert fingerprint_zeros(session.model) is None


SCOPES = ["matrix", "role", "block", "model", "layer"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("direction", ["largest", pytest.param("smallest", marks=pytest.mark.slow)])
def test_budgets_count_live_entries_and_only_these_are_chosen(scope: Any, direction: Any) -> None:
    if scope == "layer" and direction == "smallest":
        return  # refused by the settings
    method = Crossing(sparsity=0.9, score="random", scope=scope, direction=direction)
    session = begin(method, "gpt2", model=tiny_pruned("gpt2"))
    session.start()
    bank: Any = session.states["method"]["bank"]
    sites = find_sites(session.model, ("all",))
    chosen = 0
    for i, site in enumerate(sites):
        pruned = site.pruned
        assert pruned is not None
        assert not pruned.reshape(-1)[bank.positions(i).long()].any()
        count = len(bank.positions(i))
        if scope == "matrix":
            assert count == site.live - round(0.9 * site.live)
        chosen += count
    live = sum(site.live for site in sites)
    assert abs(chosen - (live - round(0.9 * live))) <= len(sites) * (scope not in ("model", "layer"))
    assert method.check_trained(session.run, session.states["method"]) == []


def test_the_smallest_live_entry_is_chosen_before_any_pruned_one() -> None:
    """SaRA takes what is below a threshold: pruned entries are, and do not count."""
    session = begin(SaRA(threshold=0.01, penalty=0), "llama", model=tiny_pruned("llama"))
    session.start()
    expected = 0
    for site in find_sites(session.model, ("all",)):
        weight, pruned = site.module.weight, site.pruned
        assert pruned is not None
        expected += int(((weight.abs() < 0.01) & ~pruned).sum())
    assert session.states["method"]["bank"].active == expected > 0


def test_a_bank_takes_no_pruned_entry() -> None:
    layer, live = pruned_layer()
    site = Site("0", layer, 0, "q", (6, 9))
    bank = Bank([site], 4)
    dead = (~live).reshape(-1).nonzero().view(-1)[:3].to(torch.int32)
    with pytest.raises(ValueError, match="pruned and stays 0"):
        bank.place([dead])
    free = Bank([Site("0", nn.Linear(9, 6), 0, "q", (6, 9))], 4)
    free.place([dead])
    with pytest.raises(ConfigError, match="pruned in this model"):
        bank.unpack(free.pack())
    with pytest.raises(RuntimeError, match="positions outside"):
        bank.load_state_dict(free.state_dict())


def refused(method: Method, optimizer: Any = None) -> str:
    train = TRAIN if optimizer is None else replace(TRAIN, clip=None)
    with pytest.raises(ConfigError) as caught:
        begin(method, "llama", train, model=tiny_pruned("llama"), optimizer=optimizer)
    assert len(caught.value.faults) == 1
    return str(caught.value)


def test_what_cannot_keep_zeros_is_refused_before_it_trains() -> None:
    assert "method=s2ft cannot keep the zeros" in refused(S2FT())
    assert "method.grain=row" in refused(Crossing(grain="row"))
    assert "optimizer=mezo" in refused(Full(), MeZO(lr=1e-3))
    # the second phase is the one that cannot
    assert "method.grain=row" in refused(Crossing(grain="row", schedule=OneShot(dense=0.5)))
    session = begin(
        LoRA(), "llama", replace(TRAIN, clip=None), model=tiny_pruned("llama"), optimizer=MeZO(lr=1e-3)
    )
    finish(session)
    settle_zeros(session.model)


def test_units_of_several_entries_are_chosen_where_nothing_is_pruned() -> None:
    session = begin(Crossing(grain="row"), "llama")
    assert make_grain("row", find_sites(session.model, ("all",))[0], session.model).size > 1


def test_masks_do_not_fit_other_weights() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="not 0"):
        hold_zeros(layer, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="shape"):
        hold_zeros(layer, torch.ones(4, 3, dtype=torch.bool))
    assert find_pruned(layer) is None


# Planted faults: each must be found by the contract.


class WritesToTheWeight(LoRA):
    """Moves a pruned entry of the pretrained weight."""

    name = "writes"  # type: ignore[misc]

    def after_step(self, run: Any, state: Any) -> None:
        for module in run.model.modules():
            pruned = stored_mask(module)
            if pruned is not None:
                module.weight.data[pruned] += 1e-3
                return


class Unmasked(LowRank):
    """Says that it keeps zeros, and applies the whole product."""

    additive = True  # type: ignore[assignment]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a) * self.scale, self.b)


class AppliesTheWholeProduct(LoRA):
    name = "unmasked"  # type: ignore[misc]

    def delta(self, site: Site) -> LowRank:
        return Unmasked(site.shape, self.rank, self.alpha, 0.0)


class WithoutMaskedGradients(InPlace):
    def _mask_gradients(self) -> None:
        pass


class TrainsAll(Method):
    name = "trains_all"

    def build(self, model: nn.Module) -> InPlace:
        names = [f"{site.name}.weight" for site in find_sites(model, ("all",))]
        return WithoutMaskedGradients(model, names, keep=True)


class RefusesWithoutCure(LoRA):
    name = "refuses"  # type: ignore[misc]

    def build(self, model: nn.Module) -> nn.ModuleDict:
        raise ConfigError("no")


@pytest.mark.parametrize(
    "method", [WritesToTheWeight, AppliesTheWholeProduct, TrainsAll, RefusesWithoutCure], ids=lambda m: m.name
)
def test_the_contract_finds_a_method_that_loses_zeros(method: Callable[[], Method]) -> None:
    with pytest.raises(AssertionError):
        contract.check_zeros(contract.Trial(method, "llama"))


def test_a_phase_after_a_merged_one_keeps_the_zeros() -> None:
    """A pruned model, tuned and merged, then tuned again by another method: the same entries are 0."""
    model = tiny_pruned("llama")
    for method in (LoRA(rank=2), Full(), Crossing(sparsity=0.9)):
        session = finish(begin(method, "llama", model=model))
        live = logits(session.tuned, "llama")
        merge(model, session.states)
        model.requires_grad_(False)
        torch.testing.assert_close(logits(model, "llama"), live, atol=2e-5, rtol=1e-4)
        for site in find_sites(model, ("all",)):
            assert site.pruned is not None
            weight = site.as_matrix(site.module.weight)
            assert torch.equal(weight == 0, site.pruned)
    assert fingerprint_zeros(model) == fingerprint_zeros(tiny_pruned("llama"))
    assert fingerprint_zeros(tiny("llama")) is None


@pytest.mark.parametrize("make", [Full, lambda: LoRA(rank=2)], ids=["full", "lora"])
def test_training_on_a_pruned_model_resumes_to_the_same_bits(make: Callable[[], Method]) -> None:
    whole = begin(make(), "llama", model=tiny_pruned("llama"))
    saved: Any = None
    for step in whole.steps():
        if step.number == 3:
            saved = copy.deepcopy(whole.state_dict())
    resumed = begin(make(), "llama", model=tiny_pruned("llama"))
    resumed.load_state_dict(saved)
    contract.same_session(finish(resumed), whole)


def test_a_pruned_entry_that_moved_is_found() -> None:
    model = tiny_pruned("llama")
    assert find_lost_zeros(model) == ""
    site = find_sites(model, ("down",))[1]
    assert site.pruned is not None
    site.module.weight.data[site.pruned] += 1
    assert (
        find_lost_zeros(model)
        == f"{site.size - site.live:,} pruned entries of {site.name} are not 0 any more"
    )
    with pytest.raises(ConfigError, match=r"Set model.zeros=free"):
        settle_zeros(model)


def test_a_change_of_the_python_door_belongs_to_its_masks(tmp_path: Path) -> None:
    def attach_to(model: Any) -> finetune.Handle:
        return finetune.attach(model, "lora", rank=2)

    attach_to(tiny_pruned("llama")).save(tmp_path / "change")
    attach_to(tiny_pruned("llama")).load(tmp_path / "change")
    other = tiny_pruned("llama")
    for name, layer in list(layers_with_zeros(other))[:1]:
        pruned = stored_mask(layer)
        assert pruned is not None, name
        hold_zeros(layer, pruned & (torch.arange(pruned.shape[1]) > 0))  # one column becomes free
    for model in (other, unmasked(tiny_pruned("llama"))):
        with pytest.raises(ConfigError, match=r"other pruned entries"):
            attach_to(model).load(tmp_path / "change")


def unmasked(model: Any) -> Any:
    """Return a copy of the weights in a model that holds nothing."""
    plain = tiny("llama")
    plain.load_state_dict(model.state_dict())
    return plain


def test_candidates_of_spiel_are_live_even_where_every_gradient_is_zero() -> None:
    session = begin(SpIEL(sparsity=0.8, window=1), "llama", model=tiny_pruned("llama"))
    session.start()
    bank, candidates = session.states["method"]["bank"], session.states["method"]["candidates"]
    candidates.resize(len(bank.values))
    candidates.begin_step(bank)
    for i, shape in enumerate(bank.shapes):
        gradient = WeightGrad(torch.zeros(1, shape[0]), torch.zeros(1, shape[1]))
        candidates.add_gradient(session.run, bank, i, gradient)
        start, end = bank.bounds()[i : i + 2]
        found = candidates.index[start:end].long()
        assert len(found.unique()) == end - start
        assert not bank.pruned(i).reshape(-1)[found].any()
