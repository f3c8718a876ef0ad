"""Compare LoRA-GA with the singular value decomposition of float64 gradients, and with peft's."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.artifacts import export
from finetune.core import statistics
from finetune.core.attach import patched
from finetune.core.layer import Patched
from finetune.errors import ConfigError
from finetune.methods.reparam import lora_ga
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.lora_ga import Anchored, LoRAGA, singular_vectors
from finetune.optim.adamw import AdamW
from finetune.testing import contract, ranks
from finetune.testing.cases import Case, Published, contract_test
from finetune.training.optimizer import make_optimizer
from finetune.training.session import Session

CASES = [Case("lora_ga", lambda: LoRAGA(rank=2), ("vit", "gpt2", "llama"), data_dependent=True)]

PUBLISHED = Published(
    "arXiv 2407.05000: the scale of the text; the other values of the released experiments",
    {
        "rank": 8,
        "alpha": 16.0,
        "scaling": "rslora",
        "direction": "ArB2r",
        "scale": "stable",
        "gamma": 16.0,
        "batches": 8,
        "targets": ("all",),
    },
    {"batches": (1, "a batch is that of a training step, where the released code takes single samples")},
)

SLOW_LLAMA = pytest.param("llama", marks=pytest.mark.slow)

test_contract = contract_test(CASES)


def start(method: LoRAGA, kind: Any = "vit", **train: Any) -> Session:
    """Make a session and let the method set its start."""
    session = contract.begin(method, kind, replace(contract.TRAIN, **train))
    session.start()
    return session


def deltas(session: Session) -> dict[str, Anchored]:
    """Return the changes of a session by the name of their layer."""
    return {name: layer.deltas[0] for name, layer in patched(session.model).items()}  # type: ignore[misc]


def gradients(session: Session, kind: Any, steps: int = 1) -> dict[str, Tensor]:
    """Compute the gradients of a plain float64 model over the first steps, by autograd; [out, in]."""
    model: Any = contract.tiny(kind).double()
    if "head" in session.states:
        head: Any = session.states["head"]
        model.load_state_dict(head.trained(), strict=False)
    weights = {}
    for name in patched(session.model):
        weights[name] = model.get_submodule(name).weight.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for micro in session.batches.steps(0, steps):
        for batch in micro:
            assert batch is not None
            inputs = dict(batch.inputs)
            if kind == "vit":
                inputs["pixel_values"] = inputs["pixel_values"].double()
            logits, labels = model(**inputs).logits, batch.labels
            if kind != "vit":
                logits, labels = logits[:, :-1], labels[:, 1:]
            total = total + nn.functional.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), reduction="sum"
            )
    found = torch.autograd.grad(total, list(weights.values()))
    transposed = {name: layer.transposed for name, layer in patched(session.model).items()}
    return {name: grad.T if transposed[name] else grad for name, grad in zip(weights, found, strict=True)}


@torch.no_grad()
def same_space(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    """Tell whether the columns of two matrices span the same space."""
    a, b = (torch.linalg.qr(each.double()).Q for each in (a, b))
    return bool((a @ a.T - b @ b.T).abs().max() < tolerance)


@pytest.mark.parametrize("kind", ["vit", "gpt2", SLOW_LLAMA])
def test_factors_are_singular_vectors_of_the_gradient(kind: Any) -> None:
    """Micro-batches of unequal size, two steps: all are summed."""
    session = start(LoRAGA(rank=2, batches=2), kind, micro_batch_size=3)
    expected = gradients(session, kind, steps=2)
    assert expected.keys() == deltas(session).keys()
    for name, delta in deltas(session).items():
        u, _, vh = torch.linalg.svd(expected[name])
        assert same_space(delta.a.T, vh[:2].T), name
        assert same_space(delta.b, u[:, 2:4]), name
        size = math.sqrt(len(u)) / 16
        eye = torch.eye(2)
        torch.testing.assert_close(delta.a @ delta.a.T, size * eye, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(delta.b.T @ delta.b, size * eye, rtol=1e-5, atol=1e-6)
        offset = (delta.scale * delta.b @ delta.a).detach()
        assert delta.scale == 16 / math.sqrt(2)
        norm = delta.scale * math.sqrt(len(u) * 2) / 16
        assert float(offset.norm()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("kind", ["vit", "gpt2", SLOW_LLAMA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_to_the_bit(kind: Any, dtype: torch.dtype) -> None:
    precision: Any = "fp32" if dtype == torch.float32 else "bf16"
    model = contract.tiny(kind).to(dtype)
    session = contract.begin(LoRAGA(rank=2), kind, replace(contract.TRAIN, precision=precision), model=model)
    session.start()
    with session.accelerator.autocast():
        assert torch.equal(
            contract.logits(session.tuned, kind), contract.logits(contract.tiny(kind).to(dtype), kind)
        )
    for layer in patched(session.model).values():
        assert torch.equal(layer.weight, layer.original)
        assert layer.count_changed() == 0


DIRECTIONS = {
    "ArB2r": ([0, 1, 2], [3, 4, 5]),
    "A2rBr": ([3, 4, 5], [0, 1, 2]),
    "ArBr": ([1, 3, 5], [0, 2, 4]),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions(direction: Any) -> None:
    for_a, for_b = LoRAGA(rank=3, direction=direction).choose_indices(torch.Generator())
    assert (for_a.tolist(), for_b.tolist()) == DIRECTIONS[direction]


def test_a_random_direction_takes_every_index_once() -> None:
    method, generator = LoRAGA(rank=3, direction="random"), torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(5):
        for_a, for_b = method.choose_indices(generator)
        assert len(for_a) == len(for_b) == 3
        assert sorted([*for_a.tolist(), *for_b.tolist()]) == list(range(6))
        drawn.append(for_a.tolist())
    assert len({str(each) for each in drawn}) > 1


def test_scales() -> None:
    weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator()
    assert LoRAGA(gamma=9.0).size_of_start(weight, generator) == pytest.approx(12**0.25 / 3)
    assert LoRAGA(scale="unit").size_of_start(weight, generator) == 1
    method = LoRAGA(rank=3, alpha=6.0, scale="gd", scaling="lora")
    assert method.factor == 2
    assert method.size_of_start(weight, generator) == 0.5
    values = torch.linalg.svdvals(weight.double())[:3]
    found = replace(method, scale="weight").size_of_start(weight, generator)
    assert found == pytest.approx(float((values / 2).sqrt().mean()), rel=1e-6)


def one_layer(gradient: Tensor, method: LoRAGA) -> Anchored:
    """Make the change of one layer, float64, with the start that a gradient gives."""
    delta = Anchored((gradient.shape[0], gradient.shape[1]), method.rank, method.factor).double()
    u, v = singular_vectors(gradient, 2 * method.rank, torch.Generator())
    for_a, for_b = method.choose_indices(torch.Generator().manual_seed(0))
    size = method.size_of_start(gradient, torch.Generator())
    delta.start_from(size * v[:, for_a].T, size * u[:, for_b])
    return delta


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_first_step_of_sgd_is_the_best_approximation_of_rank_2r(direction: Any) -> None:
    """Its cosine with the gradient is ||S[:2r]|| / ||S||; a step of LoRA has a smaller one."""
    gradient = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = LoRAGA(rank=3, direction=direction)
    delta, rate = one_layer(gradient, method), 1e-6
    (delta(gradient) * gradient).sum().backward()
    for parameter in (delta.a, delta.b):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0.1
        parameter.data.sub_(rate * parameter.grad)
    change = delta(gradient).detach()
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    best = (u[:, :6] * s[:6]) @ vh[:6]
    expected = -rate * method.factor**2 * math.sqrt(20) / 16 * best
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    cosine = float(-(change * gradient).sum() / change.norm() / gradient.norm())
    assert cosine == pytest.approx(float(s[:6].norm() / s.norm()), abs=1e-4)
    a = torch.randn(3, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = gradient @ a.T @ a  # B starts at 0
    assert float((plain * gradient).sum() / plain.norm() / gradient.norm()) < cosine


@pytest.mark.parametrize("kind", ["gpt2", SLOW_LLAMA])
def test_peft_gives_the_logits_of_the_exported_change(kind: Any) -> None:
    """The export is a LoRA of twice the rank, with the configuration that ``finetune export`` writes."""
    import peft

    session = contract.finish(contract.begin(LoRAGA(rank=2), kind))
    expected = contract.logits(session.tuned, kind)
    layers = patched(session.model)
    factors = export._factors(layers)
    assert factors is not None
    config, tensors = export._as_lora(layers, factors)
    assert config.r == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it will rename
        wrapped: Any = peft.get_peft_model(contract.tiny(kind), config)
    loaded: Any = peft.set_peft_model_state_dict(wrapped, tensors)
    assert not loaded.unexpected_keys
    torch.testing.assert_close(contract.logits(wrapped, kind), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(contract.logits(contract.tiny(kind), kind), expected, atol=1e-3)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    gradient = torch.randn(20, 14, generator=torch.Generator().manual_seed(0))
    one, other = one_layer(gradient, LoRAGA(rank=3)), one_layer(1e-3 * gradient, LoRAGA(rank=3))
    torch.testing.assert_close(one.a, other.a)
    torch.testing.assert_close(one.b, other.b)


def test_gradient_of_both_factors_is_that_of_the_product() -> None:
    """The layer computes B (A - A0) + (B - B0) A0; autograd must give the gradients of s B A."""
    torch.manual_seed(0)
    delta = Anchored((6, 5), 2, 3.0)
    delta.start_from(torch.randn(2, 5), torch.randn(6, 2))
    delta.a.data.normal_()
    delta.b.data.normal_()
    layer, x = Patched(nn.Linear(5, 6)), torch.randn(4, 5)
    layer.deltas.append(delta)
    weight = layer.base.weight + 3 * (delta.b @ delta.a - delta.b0 @ delta.a0)
    expected = nn.functional.linear(x, weight, layer.base.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), expected)
    found = torch.autograd.grad(layer(x).square().sum(), [delta.a, delta.b])
    known = torch.autograd.grad(expected.square().sum(), [delta.a, delta.b])
    torch.testing.assert_close(found, known)
    factors = delta.changes().factors
    assert factors is not None
    assert [tuple(t.shape) for t in (factors.a, factors.b)] == [(4, 5), (6, 4)]
    torch.testing.assert_close(factors.scale * factors.b @ factors.a, delta(weight))


def test_randomized_vectors_are_those_of_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 40, generator=generator) @ torch.diag(0.8 ** torch.arange(40.0))
    u, v = singular_vectors(matrix, 4, generator)
    assert u.dtype == torch.float64
    monkeypatch.setattr(lora_ga, "EXACT", 10)
    near = singular_vectors(matrix, 4, generator)
    assert near[0].dtype == torch.float32
    for found, known in zip(near, (u, v), strict=True):
        torch.testing.assert_close(found.double(), known, atol=1e-4, rtol=0)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_the_gradient_in_turns_is_that_of_all_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start(LoRAGA(rank=2))
    monkeypatch.setattr(statistics, "HELD", 3000)
    turns = []
    gather = statistics.gather_statistics

    def count(model: Any, sites: Any, *rest: Any) -> Any:
        turns.append(len(sites))
        return gather(model, sites, *rest)

    monkeypatch.setattr(statistics, "gather_statistics", count)
    contract.same_session(whole, start(LoRAGA(rank=2)))
    assert turns == [2, 2, 1, 2, 2, 2, 1]


def test_weight_decay_leaves_the_factors_alone() -> None:
    session = start(LoRAGA(rank=2))
    optimizer = make_optimizer(session.states, AdamW(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in session.states.named_parameters()}
    for parameter in session.states.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = [n for n, p in session.states.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["head.classifier/weight"]


def test_counts_what_lora_counts_and_stores_the_start() -> None:
    counts = []
    for method in (LoRA(rank=3), LoRAGA(rank=3)):
        state = contract.begin(method).states["method"]
        counts.append(sum(p.numel() for p in state.parameters()))
    assert counts[0] == counts[1]
    assert sum(tensor.numel() for tensor in state.state_dict().values()) == 2 * counts[0]


def test_a_rank_that_is_too_large_names_the_narrowest_layer() -> None:
    said = (
        r"2 layers are too narrow .* model\.layers\.0\.self_attn\.v_proj with 16 x 32\. Lower the rank to 8,"
    )
    with pytest.raises(ConfigError, match=said):
        contract.begin(LoRAGA(rank=9, targets=("q", "v")), "llama")


def test_gamma_without_its_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma=64 has no effect with scale=unit"):
        LoRAGA(scale="unit", gamma=64.0)


def test_subspaces_are_those_of_peft() -> None:
    """peft multiplies B by singular values, which leaves the space of its columns; A has another scale."""
    import peft

    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(24, 18, generator=generator) @ torch.diag(0.7 ** torch.arange(18.0))
    net: Any = nn.Sequential(nn.Linear(18, 24))
    net[0]._peft_loraga_grad = gradient
    init: dict[str, Any] = {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}
    wrapped: Any = peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=["0"], **init))
    theirs = wrapped.base_model.model[0]
    ours = one_layer(gradient.double(), LoRAGA(rank=3))
    assert same_space(ours.a.T, theirs.lora_A["default"].weight.T)
    assert same_space(ours.b, theirs.lora_B["default"].weight)


def train() -> dict[str, Tensor]:
    """Train with micro-batches, of which the second process has an empty one now and then."""
    train = replace(contract.TRAIN, micro_batch_size=1)
    return ranks.record(contract.begin(LoRAGA(rank=2, targets=("v", "up")), train=train))


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_agree_to_the_bit_and_nearly_with_one(tmp_path: Path) -> None:
    ranks.check_agreement(__file__, tmp_path, train())


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
