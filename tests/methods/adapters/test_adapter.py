"""Compare bottleneck adapters with their formula, written out on the tensors that the plain model has."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config.load import load
from finetune.core.anatomy import Anatomy, Sublayer
from finetune.core.attach import NotMergeable, merge
from finetune.data.encode import collate
from finetune.methods.adapters.adapter import Adapter, Bottleneck
from finetune.testing import sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.testing.sessions import tiny

PRESETS = {
    "houlsby": {
        "rank": 64,
        "place": "both",
        "reads": "output",
        "function": "gelu",
        "scale": 1.0,
        "train_norms": True,
        "own_norm": False,
        "dropout": 0.0,
        "start": "near",
    },
    "pfeiffer": {
        "rank": 768 // 16,
        "place": "mlp",
        "reads": "sum",
        "function": "relu",
        "scale": 1.0,
        "train_norms": False,
        "own_norm": False,
        "dropout": 0.0,
        "start": "zero",
    },
    "adaptformer": {
        "rank": 64,
        "place": "mlp",
        "reads": "residual",
        "function": "relu",
        "scale": 0.1,
        "train_norms": False,
        "own_norm": False,
        "dropout": 0.1,
        "start": "zero",
    },
}
PARALLEL = Adapter(rank=4, place="mlp", reads="input", function="relu", scale=4.0, train_norms=False)

CASES = [
    # norms are trained in place, which selectors refuse
    Case("adapter", lambda: Adapter(rank=4), ("vit", "gpt2", "llama"), selectable=False),
    Case(
        "adapter adaptformer",
        lambda: Adapter(**{**PRESETS["adaptformer"], "rank": 4}),  # type: ignore[arg-type]
        data_dependent=True,
    ),
    Case(
        "adapter sum",
        lambda: Adapter(rank=4, reads="sum", own_norm=True, train_scale=True, train_norms=False),
    ),
]

PUBLISHED = Published(
    "arXiv 1902.00751, and adapter-bert for the function and the start",
    {
        "rank": 64,
        "place": "both",
        "reads": "output",
        "function": "gelu",
        "scale": 1.0,
        "train_scale": False,
        "own_norm": False,
        "train_norms": True,
        "dropout": 0.0,
        "start": "near",
    },
    {"start": ("zero", "step 0 is then exactly the base")},
)

test_contract = contract_test(CASES)


def make(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """Make a frozen tiny model whose norms and biases are random, too."""
    if kind == "bert":
        library: Any = transformers
        sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
        config = library.BertConfig(**sizes, num_attention_heads=2)
        torch.manual_seed(7)
        model = library.BertForSequenceClassification(config).eval()
    else:
        model = tiny(kind)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).requires_grad_(False)


def answer(model: nn.Module, kind: str) -> Tensor:
    if kind == "vit":
        pixels = collate(sessions.examples("vit")[:4]).inputs["pixel_values"]
        logits: Tensor = model(pixel_values=pixels.to(next(model.parameters()).dtype)).logits
        return logits
    tokens = torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=tokens).logits
    return logits


def adapters_of(state: nn.Module) -> dict[str, Bottleneck]:
    return {name: each for name, each in state.named_modules() if isinstance(each, Bottleneck)}


def shake(state: nn.Module) -> None:
    """Set all values of the adapters at random."""
    state.double()
    for each in adapters_of(state).values():
        for parameter in each.parameters():
            parameter.data.copy_(0.5 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_values(name: str) -> None:
    method = load([f"method={name}"]).method
    assert isinstance(method, Adapter)
    assert {key: getattr(method, key) for key in PRESETS[name]} == PRESETS[name]


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_a_zero_start_is_the_base_to_the_bit(name: str, dtype: torch.dtype, kind: str) -> None:
    model = make(kind, dtype)
    plain = answer(model, kind)
    method = Adapter(**{**PRESETS[name], "start": "zero"})  # type: ignore[arg-type]
    assert method.neutral_start
    method.build(model)
    found = answer(model, kind)
    assert torch.equal(found, plain)
    assert found.dtype == dtype


def test_only_the_second_layer_has_gradients_at_a_zero_start() -> None:
    model = make("vit")
    state = PARALLEL.build(model).double()
    answer(model, "vit").square().sum().backward()
    for each in adapters_of(state).values():
        for name, parameter in each.named_parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == name.startswith("up."), name


def test_a_near_start_is_small_and_not_exact() -> None:
    model = make("vit")
    plain = answer(model, "vit")
    method = Adapter(start="near", train_norms=False)
    assert not method.neutral_start
    torch.manual_seed(0)
    state = method.build(model)
    for each in adapters_of(state).values():
        for layer in (each.down, each.up):
            assert 0.8e-3 < float(layer.weight.detach().std()) < 1e-3  # cut at two deviations
            assert float(layer.weight.detach().abs().max()) <= 2e-3
            assert not layer.bias.any()
    found = answer(model, "vit")
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "extra", "count"),
    [
        (Adapter(rank=5, train_norms=False), 0, 4),
        (Adapter(rank=5, place="attention", train_norms=False), 0, 2),
        (replace(PARALLEL, rank=5), 0, 2),
        (replace(PARALLEL, rank=5, own_norm=True, train_scale=True), 2 * 32 + 1, 2),
    ],
)
def test_counts_two_matrices_and_two_biases_per_adapter(method: Adapter, extra: int, count: int) -> None:
    state = method.build(make("vit"))
    assert sum(p.numel() for p in state.parameters()) == count * (2 * 5 * 32 + 5 + 32 + extra)


def test_houlsby_trains_all_norms_of_the_body() -> None:
    for kind, norms, values in (("vit", 5, 64), ("llama", 5, 32), ("bert", 5, 64)):
        state = Adapter(rank=5).build(make(kind))
        assert sum(p.numel() for p in state["norms"].parameters()) == norms * values, kind


def tensors_of(model: nn.Module, part: Sublayer, kind: str, norm_first: bool) -> dict[str, Tensor]:
    """Return the tensors that an adapter can read, from a run of the plain model."""
    seen: dict[str, Tensor] = {}
    handles = [
        part.first.module.register_forward_pre_hook(lambda _m, args: seen.update(input=args[0])),
        part.last.module.register_forward_hook(lambda _m, _a, y: seen.update(output=y)),
    ]
    if norm_first:
        handles.append(
            part.norm.module.register_forward_pre_hook(lambda _m, args: seen.update(residual=args[0]))
        )
    answer(model, kind)
    for handle in handles:
        handle.remove()
    if not norm_first:
        seen["residual"] = seen["input"]
    seen["sum"] = seen["residual"] + seen["output"]
    if not norm_first:
        seen["sum"] = part.norm.module(seen["sum"])
    return seen


@pytest.mark.parametrize("reads", ["output", "input", "residual", "sum"])
@pytest.mark.parametrize("place", ["attention", "mlp"])
@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama", "bert"])
def test_the_formula_is_added_to_the_output_of_the_sublayer(kind: str, place: Any, reads: Any) -> None:
    model = make(kind)
    anatomy = Anatomy.of(model)
    part = getattr(anatomy.blocks[0], place)
    plain = tensors_of(model, part, kind, anatomy.norm_first)
    method = Adapter(rank=4, place=place, reads=reads, function="tanh", scale=0.7, train_norms=False)
    state = method.build(model)
    shake(state)
    adapter = adapters_of(state)[f"adapters.{anatomy.blocks[0].name.replace('.', '/')}/{place}"]
    hidden = torch.tanh(plain[reads] @ adapter.down.weight.T + adapter.down.bias)
    expected = plain["output"] + 0.7 * (hidden @ adapter.up.weight.T + adapter.up.bias)
    found: list[Tensor] = []
    model.get_submodule(part.last.name).register_forward_hook(lambda _m, _a, y: found.append(y))
    answer(model, kind)
    torch.testing.assert_close(found[0], expected)


def test_a_norm_of_its_own_normalizes_what_is_read() -> None:
    method = Adapter(rank=4, own_norm=True, train_scale=True, scale=0.5, function="swish")
    torch.manual_seed(0)
    adapter = Bottleneck(32, method)
    adapter.up.weight.data.normal_()
    y = torch.randn(3, 32)
    hidden = F.silu(adapter.down(F.layer_norm(y, (32,))))
    torch.testing.assert_close(adapter(y, y), 0.5 * adapter.up(hidden))
    adapter(y, y).sum().backward()
    assert isinstance(adapter.scale, nn.Parameter)
    torch.testing.assert_close(adapter.scale.grad, adapter.up(hidden).sum())


def test_with_a_first_layer_of_0_every_form_adds_the_same_constant() -> None:
    added = []
    for reads in ("output", "input", "residual", "sum"):
        adapter = Bottleneck(6, Adapter(rank=3, reads=reads))
        adapter.down.weight.data.zero_()
        adapter.down.bias.data.copy_(torch.tensor([-1.0, 0.5, 2.0]))
        adapter.up.weight.data.copy_(torch.arange(18.0).view(6, 3))
        adapter.up.bias.data.fill_(0.25)
        added.append(adapter(torch.randn(2, 6), torch.randn(2, 6)))
        constant = adapter.up.weight @ F.gelu(torch.tensor([-1.0, 0.5, 2.0])) + 0.25
        torch.testing.assert_close(added[-1], constant.expand(2, 6))


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_with_the_identity_a_sequential_adapter_is_a_product_of_weights(kind: str) -> None:
    """W' = (1 + s W_up W_down) W, and the bias likewise."""
    model = make(kind)
    merged = copy.deepcopy(model)
    state = Adapter(rank=4, place="attention", function="identity", scale=0.5, train_norms=False).build(model)
    shake(state)
    blocks = zip(Anatomy.of(merged).blocks, adapters_of(state).values(), strict=True)
    for block, adapter in blocks:
        module: Any = block.attention.last.module
        weight = module.weight.T if kind == "gpt2" else module.weight
        product = 0.5 * adapter.up.weight @ adapter.down.weight
        constant = 0.5 * (adapter.up.weight @ adapter.down.bias + adapter.up.bias)
        new = weight + product @ weight
        module.weight.data = (new.T if kind == "gpt2" else new).detach().contiguous()
        module.bias.data = (module.bias + product @ module.bias + constant).detach()
    torch.testing.assert_close(answer(merged, kind), answer(model, kind))


def test_with_the_identity_a_parallel_adapter_of_a_linear_map_is_added_to_its_weight() -> None:
    """With an MLP that computes 0, the parallel adapter still acts: W' = s W_up W_down."""
    model = make("llama")
    merged = copy.deepcopy(model)
    for each in (model, merged):
        for layer in each.model.layers:
            layer.mlp.down_proj.weight.data.zero_()
    state = replace(PARALLEL, function="identity").build(model)
    shake(state)
    for layer, adapter in zip(merged.model.layers, adapters_of(state).values(), strict=True):
        adapter.down.bias.data.zero_()
        adapter.up.bias.data.zero_()
        layer.mlp = nn.Linear(32, 32, bias=False).double()
        layer.mlp.weight.data = (4.0 * adapter.up.weight @ adapter.down.weight).detach()
    torch.testing.assert_close(answer(merged, "llama"), answer(model, "llama"))


@pytest.mark.parametrize(("optimizer", "ratio"), [(torch.optim.SGD, 16.0), (torch.optim.Adam, 4.0)])
def test_a_scale_equals_a_scaled_second_layer_of_another_rate(
    optimizer: type[torch.optim.Optimizer], ratio: float
) -> None:
    """The rate differs by the square of the scale under SGD, and by the scale under Adam."""
    y = torch.randn(5, 6, dtype=torch.float64)
    torch.manual_seed(0)
    one, scaled = (Bottleneck(6, Adapter(rank=3, scale=s)).double() for s in (1.0, 4.0))
    scaled.load_state_dict(one.state_dict())
    scaled.up.weight.data.normal_()
    scaled.up.bias.data.normal_()
    one.up.weight.data, one.up.bias.data = 4 * scaled.up.weight.data, 4 * scaled.up.bias.data
    torch.testing.assert_close(one(y, y), scaled(y, y))
    moved = []
    for each, scale in ((one, 1.0), (scaled, 4.0)):
        before = scale * each.up.weight.detach().clone()
        each(y, y).square().sum().backward()
        optimizer(each.up.parameters(), lr=0.01).step()  # type: ignore[call-arg]
        moved.append(scale * each.up.weight.detach() - before)
    torch.testing.assert_close(moved[1], ratio * moved[0])


def test_in_a_post_norm_model_the_adapter_enters_the_sum_before_the_norm() -> None:
    model = make("bert")
    block = Anatomy.of(model).blocks[0]
    state = Adapter(rank=4, place="mlp", train_norms=False).build(model)
    shake(state)
    seen: dict[str, Tensor] = {}
    block.mlp.last.module.register_forward_hook(lambda _m, _a, y: seen.update(output=y))
    block.mlp.first.module.register_forward_pre_hook(lambda _m, args: seen.update(residual=args[0]))
    block.module.register_forward_hook(
        lambda _m, _a, y: seen.update(left=y[0] if isinstance(y, tuple) else y)
    )
    answer(model, "bert")
    norm = block.mlp.norm.module
    torch.testing.assert_close(seen["left"], norm(seen["output"] + seen["residual"]))


def test_dropout_of_an_adapter_leaves_the_frozen_path_alone() -> None:
    model = make("vit")
    plain = answer(model, "vit")
    state = replace(PARALLEL, dropout=0.5).build(model).double()
    state.train()
    assert torch.equal(answer(model, "vit"), plain)
    shake(state)
    assert not torch.equal(answer(model, "vit"), answer(model, "vit"))
    state.eval()
    assert torch.equal(answer(model, "vit"), answer(model, "vit"))


def test_backward_stops_at_the_lowest_adapter() -> None:
    model = make("vit")
    seen: list[Tensor] = []
    block = Anatomy.of(model).blocks[0]
    block.mlp.first.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    block.module.register_forward_hook(lambda _m, _a, y: seen.append(y))
    state = PARALLEL.build(model).double()
    answer(model, "vit").sum().backward()
    assert [each.requires_grad for each in seen] == [False, True]
    trained = {id(p) for p in state.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_merging_is_refused() -> None:
    model = make("vit")
    state = Adapter(rank=4).build(model)
    with pytest.raises(NotMergeable, match=r"attaches a bottleneck adapter, which no weight can hold"):
        merge(model, state)
