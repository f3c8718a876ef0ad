"""What the analysis ``geometry``, which ``inspect`` prints, says about a run.

The oracles are numpy's SVD, scipy's angles and the weights of merged models.

The numbered invariants are those of the card of arXiv 2511.08567.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from finetune.analyses.geometry import (
    Geometry,
    Update,
    effective_rank,
    largest_angle,
    mask_largest,
    mask_unchanged,
    masks,
    measure,
    shared,
    singular_values,
    spectrum,
    sum_measures,
)
from finetune.artifacts import analyze, merge
from finetune.artifacts import reopen as finished
from finetune.cli import artifacts as cli
from finetune.config.load import load
from finetune.core.site import Site
from finetune.errors import ConfigError
from finetune.storage.run_folder import RunFolder, run_folder
from finetune.testing import contract
from finetune.training import run


def inspect(path: Path, **options: Any) -> dict[str, Any]:
    """Return what the command prints as JSON."""
    found, _ = analyze.inspect(Geometry(**options), path)
    return found


SHAPES = [(40, 24), (24, 40), (17, 17)]


def some(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(some((n, n), seed).double()).Q


def measure_row(
    before: Tensor,
    after: Tensor,
    k: int = 6,
    alpha: float = 0.5,
    sparse: bool = True,
    grad: Tensor | None = None,
) -> dict[str, Any]:
    """The row of one layer."""
    site = Site("vit.layers.3.q", nn.Linear(1, 1), 3, "q", (before.shape[0], before.shape[1]))
    return shared(measure(Update(site, before, after, grad), k, alpha, sparse))


def test_unchanged_means_equal_for_all_neighbours_in_bfloat16_and_zeros_of_both_signs() -> None:
    """Invariant 1. Neighbours are the closest pairs, so that others differ more."""
    bits = torch.arange(0x0080, 0x7F80, dtype=torch.int32).to(
        torch.int16
    )  # all positive normal values, ascending
    values = bits.view(torch.bfloat16)
    for a in (values, -values):
        assert mask_unchanged(a, a).all()
        assert not mask_unchanged(a[1:], a[:-1]).any()
        assert not mask_unchanged(a[:-1], a[1:]).any()
    assert not mask_unchanged(values, -values).any()
    other = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(mask_unchanged(values, other), values == other)
    zero = torch.zeros(2, dtype=torch.bfloat16)
    assert mask_unchanged(zero, -zero).all()
    assert not mask_unchanged(torch.zeros_like(values), values).any()


def test_the_tolerance_would_be_wrong_in_float16_so_types_are_compared_as_stored_or_rounded_first() -> None:
    """Invariant 2."""
    half = torch.linspace(1, 2, 1025)[512:].half()[:-1]
    up = torch.nextafter(half.float(), torch.tensor(9.0)).half()
    up = (half.view(torch.int16) + 1).view(torch.float16)
    by_the_formula = (up.float() - half.float()).abs() <= 1e-3 * up.float()
    assert by_the_formula.all()
    row = measure_row(half.view(16, 32), up.view(16, 32), 3)
    assert row["changed"] == 512
    rounded = up.bfloat16() != half.bfloat16()
    assert 0 < row["changed_bf16"] == int(rounded.sum()) < 512
    single = torch.linspace(1, 1.001, 64).view(8, 8)
    assert measure_row(single, torch.nextafter(single, torch.tensor(9.0)), 3)["changed_bf16"] == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 7.0]), min_size=1, max_size=40), st.data())
def test_largest_is_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    score = torch.tensor(values).view(1, -1)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert mask_largest(score, k).view(-1).nonzero().view(-1).tolist() == sorted(order)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_of_a_half_and_at_full_rank(shape: tuple[int, int]) -> None:
    """Invariant 3; and the mask of a lower rank is that of numpy's truncated SVD."""
    w = some(shape)
    n = w.numel()
    found = masks(w, spectrum(w, 5), 0.5)
    assert int(found["principal"].sum()) == round(n / 2)
    assert int((~found["principal"]).sum()) == n - round(n / 2)
    u, s, vh = np.linalg.svd(w.double().numpy(), full_matrices=False)
    size = np.abs((u[:, :5] * s[:5]) @ vh[:5]).ravel()
    assert set(found["principal"].view(-1).nonzero().view(-1).tolist()) == set(
        np.argsort(-size)[: round(n / 2)].tolist()
    )
    for alpha in (0.05, 0.3, 0.5):
        full = masks(w, spectrum(w, min(shape)), alpha)["principal"]
        rest = masks(w, spectrum(w, min(shape)), 1 - alpha)["low"]
        assert torch.equal(full, mask_largest(w.abs(), round(alpha * n)))
        assert not (full & rest).any()
    assert torch.equal(found["principal_not_low"], found["principal"] & ~found["low"])
    tied = torch.where(w > 1, w, torch.tensor(1e-14))
    assert torch.equal(
        masks(tied, spectrum(tied, min(shape)), 0.5)["principal"], mask_largest(tied, round(n / 2))
    )


def test_a_random_mask_overlaps_by_chance_and_complements_add_to_one() -> None:
    """Invariant 4."""
    w = some((60, 50))
    shares: dict[str, list[float]] = {"principal": [], "low": [], "magnitude": [], "gradient": []}
    for draw in range(60):
        hit = torch.rand(w.shape, generator=torch.Generator().manual_seed(draw)) < 0.1
        row = measure_row(w, torch.where(hit, w + 1, w), 6, 0.3, grad=some((60, 50), 7))
        for name, found in shares.items():
            found.append(row["overlap"][name]["share"])
        assert row["overlap"]["magnitude"]["chance"] == row["density"]
        assert row["overlap"]["low"]["chance"] == pytest.approx(0.3)
    for name, found in shares.items():
        assert np.mean(found) == pytest.approx(0.1 if name in ("magnitude", "gradient") else 0.3, abs=0.02)
    mask = masks(w, spectrum(w, 6), 0.3)["principal"]
    hit = w > 1
    row = measure_row(w, torch.where(hit, 2 * w, w), 6, 0.3)
    outside = int((~mask & hit).sum()) / int(hit.sum())
    assert row["overlap"]["principal"]["share"] + outside == pytest.approx(1)


def test_known_overlaps() -> None:
    w = some((30, 20))
    top = mask_largest(w.abs(), 60)
    row = measure_row(w, torch.where(top, w + 1, w), 4, 0.1, grad=-w)
    assert row["changed"] == 60
    assert {name: row["overlap"][name]["share"] for name in ("magnitude", "gradient", "low")} == {
        "magnitude": 1,
        "gradient": 1,
        "low": 0,
    }
    low = ~mask_largest(w.abs(), 540)
    assert measure_row(w, torch.where(low, w + 1, w), 4, 0.1)["overlap"]["low"]["share"] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_keeps_the_spectrum_and_a_factor_keeps_the_directions(shape: tuple[int, int]) -> None:
    """Invariant 6."""
    w = some(shape).double()
    turned = measure_row(w.float(), (rotation(shape[0]) @ w).float())
    assert turned["nss"] < 1e-6
    assert turned["angle_right"] < 1e-3
    assert turned["angle_left"] > 10
    scaled = measure_row(w.float(), 1.25 * w.float())
    assert scaled["nss"] == pytest.approx(0.25)
    assert max(scaled["angle_left"], scaled["angle_right"]) < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 99), st.sampled_from([1e-3, 0.1, 3.0]))
def test_spectrum_angles_and_bound(shape: tuple[int, int], seed: int, size: float) -> None:
    """Invariant 7, and the numbers themselves by numpy and scipy."""
    before, after = some(shape, seed), some(shape, seed) + size * some(shape, seed + 1000)
    row, k = measure_row(before, after), 6
    (u0, s0, v0), (u1, s1, v1) = (
        np.linalg.svd(w.double().numpy(), full_matrices=False) for w in (before, after)
    )
    assert row["nss"] == pytest.approx(np.linalg.norm(s1 - s0) / np.linalg.norm(s0), rel=1e-6)
    assert row["nss"] <= row["relative_norm"] * (1 + 1e-6)
    assert row["angle_left"] == pytest.approx(
        math.degrees(subspace_angles(u0[:, :k], u1[:, :k]).max()), rel=1e-5, abs=1e-4
    )
    assert row["angle_right"] == pytest.approx(
        math.degrees(subspace_angles(v0[:k].T, v1[:k].T).max()), rel=1e-5, abs=1e-4
    )
    change = np.linalg.svd((after - before).double().numpy(), compute_uv=False)
    p = change / change.sum()
    assert row["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert row["stable_rank"] == pytest.approx((change**2).sum() / change[0] ** 2, rel=1e-5)
    assert row["gap"] == pytest.approx((s0[k - 1] - s0[k]) / s0[0], rel=1e-5)
    assert row["relative_norm"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(s0), rel=1e-5)


def test_ranks_that_are_known() -> None:
    assert effective_rank(torch.ones(5).double()) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(3).double()) == 0
    low = some((50, 2)).double() @ some((2, 30), 1).double()
    assert effective_rank(singular_values(low)) <= 2 * (1 + 1e-4)
    assert largest_angle(*(rotation(9)[:, cols] for cols in (slice(0, 3), slice(3, 6)))) == pytest.approx(90)


@pytest.mark.parametrize("w", [torch.zeros(6, 4), some((6, 1)) @ some((1, 4))])
def test_no_change_and_weights_of_low_rank_give_numbers(w: Tensor) -> None:
    same, other = measure_row(w, w, 3), measure_row(w, w + some((6, 4), 5), 3)
    assert same["changed"] == same["nss"] == same["angle_left"] == same["effective_rank"] == 0
    assert same["overlap"]["low"]["share"] is None
    assert all(math.isfinite(v) for row in (same, other) for v in row.values() if isinstance(v, float))


def test_layers_together_are_as_one() -> None:
    pairs = [
        (some(shape, i), some(shape, i) + (some(shape, i + 50) > 1) * 0.1) for i, shape in enumerate(SHAPES)
    ]
    rows = [measure_row(a, b, 4, 0.2) for a, b in pairs]
    whole = sum_measures(rows)
    before, after = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    assert whole["density"] == pytest.approx(float((before != after).float().mean()))
    assert whole["relative_norm"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    assert whole["effective_rank"] == pytest.approx(np.mean([r["effective_rank"] for r in rows]))
    low = torch.cat(
        [(~mask_largest(a.abs(), a.numel() - round(0.2 * a.numel()))).flatten() for a, _ in pairs]
    )
    hit = before != after
    assert whole["overlap"]["low"]["share"] == pytest.approx(int((low & hit).sum()) / int(hit.sum()))
    assert whole["overlap"]["low"]["chance"] == pytest.approx(0.2, abs=2e-3)


def pictures() -> list[str]:
    """A few images in the working directory, as a data set."""
    for i in range(40):
        place = Path("pictures") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 120, (16, 16, 3), np.uint8) + np.uint8(100 * (i % 2))
        Image.fromarray(pixels).save(place / f"{i}.png")
    return ["dataset=imagefolder", "dataset.path=pictures"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    contract.tiny().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain(folder: str | Path) -> Any:
    import transformers

    return transformers.ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).requires_grad_(
        False
    )


def go(model: str, *more: str) -> RunFolder:
    small = [
        *pictures(),
        "train.steps=4",
        "train.batch_size=8",
        "train.eval_every=null",
        "train.threads=1",
        "name=t",
        "model=hf",
        f"model.path={model}",
    ]
    config = load([*small, *more])
    run.train(config, run_folder(config), lambda line: None, lambda done, total, words: None)
    return RunFolder(run_folder(config))


@pytest.mark.parametrize(
    "words",
    [["method=shira", "sparsity=0.9"], ["method=full"], ["method=lora"], ["method=snell"], ["method=bitfit"]],
)
def test_a_run_is_what_its_merged_model_differs_in(model: str, here: Path, words: list[str]) -> None:
    """The oracle: two plain model folders, read from disk."""
    files = go(model, *words, "optimizer.lr=0.01")
    found = inspect(files.path, rank=5, alpha=0.4)
    merge.merge(files.path, here / "merged")
    before, after = (dict(plain(folder).named_parameters()) for folder in (model, here / "merged"))
    body = [n for n in before if not n.startswith("classifier")]
    matrices = {n.removesuffix(".weight"): n for n in body if before[n].ndim == 2 and "layers" in n}
    assert {row["layer"] for row in found["layers"]} == (
        set() if words == ["method=bitfit"] else set(matrices)
    )
    for row in found["layers"]:
        w0, w1 = before[matrices[row["layer"]]], after[matrices[row["layer"]]]
        assert row["changed"] == int((w0 != w1).sum())
        assert row["relative_norm"] == pytest.approx(float((w1 - w0).norm() / w0.norm()), rel=1e-5)
        s0, s1 = (torch.linalg.svdvals(w.double()) for w in (w0, w1))
        assert row["nss"] == pytest.approx(float((s1 - s0).norm() / s0.norm()), rel=1e-5)
    assert found["mask"] == ("changed_bf16" if words[0] in ("method=full", "method=lora") else "changed")
    rest = [n for n in body if n not in matrices.values() and not torch.equal(before[n], after[n])]
    assert {row["parameter"] for row in found["others"] if row["changed"]} == set(rest)
    assert sum(row["changed"] for row in found["others"]) == sum(
        int((before[n] != after[n]).sum()) for n in rest
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    if words[0] == "method=shira":
        assert found["total"]["changed"] <= sum(
            s["entries"] - round(0.9 * s["entries"]) for s in found["layers"]
        )
    if found["layers"]:
        assert [row["role"] for row in found["roles"]] == ["q", "k", "v", "o", "up", "down"]
        assert [row["block"] for row in found["blocks"]] == [0, 1]
        assert (
            sum(row["changed"] for row in found["roles"])
            == sum(row["changed"] for row in found["blocks"])
            == found["total"]["changed"]
        )


@pytest.mark.parametrize("method", ["shira", "full"])
def test_the_gradient_mask_is_that_of_the_untrained_model(model: str, here: Path, method: str) -> None:
    files = go(model, f"method={method}", "optimizer.lr=0.01")
    found = inspect(files.path, rank=5, gradient=2)
    setup = finished.rebuild(files.path)
    start = load(
        [
            *pictures(),
            "train.steps=4",
            "train.batch_size=8",
            "train.threads=1",
            "model=hf",
            f"model.path={model}",
            "method=head",
        ]
    )
    from finetune.training.prepare import prepare

    bare = prepare(start)
    net = bare.session.model.eval().requires_grad_(True)
    total = torch.zeros(())
    for micro in bare.session.batches.steps(0, 2):
        for batch in micro:
            total = total + nn.functional.cross_entropy(net(**batch.inputs).logits, batch.labels)
    total.backward()
    for row in found["layers"]:
        layer = setup.session.model.get_submodule(row["layer"])
        with torch.no_grad():
            w0 = dict(net.named_parameters())[f"{row['layer']}.weight"]
            changed = layer.weight != w0 if method == "shira" else ~mask_unchanged(w0, layer.weight)
            grad: Any = w0.grad
            hits = mask_largest(grad.abs(), int(changed.sum())) & changed
        assert (
            abs(row["overlap"]["gradient"]["hits"] - int(hits.sum())) <= 2
        )  # nearly equal gradients, summed in another order
        assert row["overlap"]["gradient"]["of"] == int(changed.sum())


def test_churn_is_read_from_the_log_and_checkpoints_can_be_looked_at(model: str, here: Path) -> None:
    files = go(model, "method=shira", "train.save_every=2")
    assert inspect(files.path)["churn"] == []
    with files.metrics.open("a") as log:
        log.write(
            json.dumps({"step": 3, "churn": 0.25, "loss": 1.0})
            + "\n"
            + json.dumps({"step": 4, "churn": 0.0})
            + "\n"
        )
    found = inspect(files.path)
    assert found["churn"] == [{"step": 3, "churn": 0.25}, {"step": 4, "churn": 0.0}]
    assert (found["step"], found["folder"]) == (4, str(files.path / "inspect"))
    early = inspect(files.checkpoint(2))
    assert (early["step"], early["folder"]) == (2, str(files.path / "inspect" / "step-2"))
    assert early["total"]["change_norm"] < found["total"]["change_norm"]


def test_the_command_prints_a_table_or_json_and_writes_plots_only(
    model: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = go(model, "method=shira")
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    cli.inspect([str(files.path)], rank=4, alpha=0.3, gradient=1)
    said = capsys.readouterr().out
    assert "block 1" in said
    assert "|g|" in said
    cli.inspect([f"ckpt={files.path}"], rank=4, alpha=0.3, gradient=0, as_json=True)
    told = json.loads(capsys.readouterr().out)
    plots = [files.path / "inspect" / f"{name}.png" for name in ("density", "relative_norm")]
    assert told["plots"] == [str(file) for file in plots]
    assert (told["rank"], told["alpha"]) == (4, 0.3)
    after = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    assert {file for file in after if file not in before} == {file.resolve() for file in plots}
    assert all(after[file] == content for file, content in before.items())
    for words in ([], [str(files.path), str(files.path)], ["nowhere"]):
        with pytest.raises(ConfigError):
            cli.inspect(words)


def test_runs_that_changed_no_weight_are_refused(model: str, here: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to inspect"):
        inspect(go(model, "method=head").path)
