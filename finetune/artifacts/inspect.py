"""What a finished run changed: how much, where, along which directions, and in which entries.

The update of a layer is its weight with the stored change in it, as merging would write it, minus the pretrained one. How it is measured follows "The
Path Not Taken" (arXiv 2511.08567): changed entries, spectrum, principal angles, and overlap with masks made from the pretrained weight alone. One
matrix is looked at at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.linalg import kth_smallest
from ..core.part import base, patched, trained_in_place
from ..core.site import Site, all_sites
from ..errors import ConfigError
from ..storage.delta import read_description
from ..storage.run_folder import RunFolder
from ..system import safe
from ..training.loss import count, example_losses
from ..training.prepare import Setup
from .reopen import rebuild, run_of

ETA = 1e-3  # the paper's tolerance, below the distance of neighbours in bfloat16
DENSE = 0.5  # a run that changed more than this share is looked at as bfloat16 would show it: else its overlaps are all near chance


def unchanged(w0: Tensor, w1: Tensor) -> Tensor:
    """Where two weights are equal in bfloat16: |w1 - w0| <= eta max(|w0|, |w1|) after both are rounded to it (definition 2.1)."""
    a, b = w0.to(torch.bfloat16).float(), w1.to(torch.bfloat16).float()
    return (b - a).abs() <= ETA * torch.maximum(a.abs(), b.abs())


def largest(score: Tensor, k: int) -> Tensor:
    """The mask of the ``k`` largest entries; of equal ones the first."""
    flat = score.reshape(-1)
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    cut = kth_smallest(flat, len(flat) - k)
    mask = flat > cut
    mask[(flat == cut).nonzero().view(-1)[: k - int(mask.sum())]] = True
    return mask.view(score.shape)


@dataclass(frozen=True)
class Spectrum:
    """All singular values, descending, and the first k singular vectors as columns; float64."""

    sigma: Tensor
    left: Tensor
    right: Tensor


def _gram(w: Tensor) -> Tensor:
    wide = w.double()
    return wide.T @ wide if w.shape[0] >= w.shape[1] else wide @ wide.T


def spectrum(w: Tensor, k: int) -> Spectrum:
    """By the eigenvectors of the smaller Gram matrix in float64: several times faster than an SVD, and exact to about 1e-8 of the largest value."""
    tall = w.shape[0] >= w.shape[1]
    values, vectors = torch.linalg.eigh(_gram(w))
    short = vectors.flip(1)[:, :k]
    long = torch.linalg.qr(
        (w.double() if tall else w.double().T) @ short
    ).Q  # orthonormal where the rank is below k, too
    return Spectrum(values.clamp(min=0).sqrt().flip(0), *((long, short) if tall else (short, long)))


def singular_values(w: Tensor) -> Tensor:
    """Descending, float64; with the accuracy of ``spectrum``."""
    values: Tensor = torch.linalg.eigvalsh(_gram(w))
    return values.clamp(min=0).sqrt().flip(0)


def largest_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle between the spans of the columns, which are orthonormal, in degrees."""
    overlap = a.T @ b
    sine = torch.linalg.matrix_norm(b - a @ overlap, 2)
    cosine = torch.linalg.svdvals(overlap)[-1]
    return math.degrees(math.atan2(float(sine), float(cosine)))


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum; 0 for a matrix of zeros."""
    p = sigma[sigma > 0] / sigma.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def masks(w0: Tensor, basis: Spectrum, alpha: float) -> dict[str, Tensor]:
    """The paper's masks of a pretrained weight: the ``alpha`` largest entries of its rank-k approximation, the ``alpha`` smallest of the weight."""
    count, rank = round(alpha * w0.numel()), basis.left.shape[1]
    approximation = (
        (basis.left @ (basis.left.T @ w0.double())).float() if rank < min(w0.shape) else w0
    ).abs()
    principal, low = largest(approximation, count), ~largest(w0.abs(), w0.numel() - count)
    return {"principal": principal, "low": low, "principal_not_low": principal & ~low}


@dataclass(frozen=True)
class Update:
    """One layer before and after, in the type in which the model is stored; ``grad`` if it was asked for."""

    site: Site
    before: Tensor
    after: Tensor
    grad: Tensor | None = None


def measure(update: Update, k: int, alpha: float, sparse: bool) -> dict[str, Any]:
    """The numbers of one layer. ``sparse``: overlaps are of the changed entries, else of those that bfloat16 shows as changed."""
    w0, w1 = update.before.float(), update.after.float()
    changed, seen, change = update.after != update.before, ~unchanged(w0, w1), w1 - w0
    n, k = w0.numel(), min(k, *w0.shape)
    old = spectrum(w0, k)
    mask = changed if sparse else seen
    total = int(mask.sum())
    found = masks(w0, old, alpha) | {"magnitude": largest(w0.abs(), total)}
    if update.grad is not None:
        found["gradient"] = largest(update.grad.abs(), total)
    return {
        "layer": update.site.name, "role": update.site.role, "block": update.site.block, "shape": list(w0.shape), "entries": n,
        "changed": int(changed.sum()), "changed_bf16": int(seen.sum()), "change_norm": float(change.double().norm()),
        "weight_norm": float(w0.double().norm()), **_spectral(old, w1, change, k),
        "overlap": {name: {"hits": int((m & mask).sum()), "of": total, "chance": int(m.sum()) / n} for name, m in found.items()},
    }  # fmt: skip


def _spectral(old: Spectrum, w1: Tensor, change: Tensor, k: int) -> dict[str, float]:
    """What became of the spectrum. ``gap``: (sigma_k - sigma_k+1) / sigma_1; angles say little where it is near 0."""
    largest_value = float(old.sigma[0])
    names = ("effective_rank", "stable_rank", "nss", "angle_left", "angle_right", "gap")
    if not change.any() or not largest_value:
        return dict.fromkeys(names, 0.0)
    new, sigma = spectrum(w1, k), singular_values(change)
    after_k = float(old.sigma[k]) if k < len(old.sigma) else 0.0
    stable, nss = (
        float(sigma.square().sum() / sigma[0].square()),
        float((new.sigma - old.sigma).norm() / old.sigma.norm()),
    )
    angles = largest_angle(old.left, new.left), largest_angle(old.right, new.right)
    return dict(
        zip(
            names,
            (
                effective_rank(sigma),
                stable,
                nss,
                *angles,
                (float(old.sigma[k - 1]) - after_k) / largest_value,
            ),
            strict=True,
        )
    )


def updates(setup: Setup, gradient: int = 0) -> Iterator[Update]:
    """The layers that a rebuilt run may have changed, in the model's order, the new head left out."""
    session, new = setup.session, set(setup.base.head)
    trained = {name: p for name, p in trained_in_place(session.states).items() if name not in new}
    layers = patched(session.model)
    grads = _gradients(setup, gradient) if gradient else {}
    sites = all_sites(session.model)
    for site in sites:
        if site.name in layers:
            layer = layers[site.name]
            yield Update(site, layer.original.detach(), layer.weight, grads.get(site.name))
    with base(session.states):
        for site in sites:
            if (name := f"{site.name}.weight") in trained and site.name not in layers:
                before = site.as_matrix(site.module.get_parameter("weight"))
                after = site.as_matrix(trained[name]).to(before.dtype)
                yield Update(site, before, after, grads.get(site.name))


def others(setup: Setup) -> list[dict[str, Any]]:
    """What else was trained in place: embeddings, norms, biases; the new head left out."""
    session, matrices = setup.session, {f"{s.name}.weight" for s in all_sites(setup.session.model)}
    skip = matrices | set(setup.base.head)
    found = {n.replace(".base.", "."): p.detach() for n, p in trained_in_place(session.states).items()}
    trained = {name: p for name, p in found.items() if name not in skip}
    rows = []
    with base(session.states):
        for name, before in session.model.named_parameters():
            if (plain := name.replace(".base.", ".")) in trained:
                after = trained[plain].to(before.dtype)
                change, weight = (after.double() - before.double()).norm(), before.double().norm()
                relative = float(change / weight) if weight else None
                rows.append(
                    {
                        "parameter": plain,
                        "entries": before.numel(),
                        "changed": int((after != before).sum()),
                        "relative_norm": relative,
                    }
                )
    return rows


@torch.enable_grad()
def _gradients(setup: Setup, steps: int) -> dict[str, Tensor]:
    """The gradient of the untrained model's loss over the first ``steps`` training batches, by layer, [out, in]: what a gradient mask is made of."""
    session = setup.session
    with base(session.states):
        weights = {
            s.name: s.module.get_parameter("weight")
            for s in all_sites(session.model)
            if not s.module.get_parameter("weight").requires_grad
        }
        sites = {s.name: s for s in all_sites(session.model)}
        session.tuned.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in (b for micro in session.batches.steps(0, steps) for b in micro if b):
            with session.accelerator.autocast():
                logits = session.tuned(**session.compute.on_device(batch.inputs))
            (example_losses(logits, batch.labels.to(logits.device)).sum() / count(batch)).backward()
        found = {
            name: sites[name].as_matrix(w.grad).float() for name, w in weights.items() if w.grad is not None
        }
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    return found


MEANS = ("effective_rank", "stable_rank", "nss", "angle_left", "angle_right")


def summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for several layers: counts and squared norms add up, ranks, NSS and angles are means, an overlap is that of all entries together."""
    total = {key: sum(r[key] for r in rows) for key in ("entries", "changed", "changed_bf16")}
    norms = {key: math.sqrt(sum(r[key] ** 2 for r in rows)) for key in ("change_norm", "weight_norm")}
    found: dict[str, Any] = {"layers": len(rows), **total, **norms}
    found |= {key: sum(r[key] for r in rows) / len(rows) for key in MEANS}
    overlap = {}
    for name in rows[0]["overlap"]:
        parts = [r["overlap"][name] for r in rows]
        of = sum(p["of"] for p in parts)
        chance = sum(p["chance"] * p["of"] for p in parts) / of if of else 0.0
        overlap[name] = {"hits": sum(p["hits"] for p in parts), "of": of, "chance": chance}
    return shared({**found, "overlap": overlap})


def shared(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its counts as shares, too."""
    density, density_bf16 = (row[key] / row["entries"] for key in ("changed", "changed_bf16"))
    relative = row["change_norm"] / row["weight_norm"] if row["weight_norm"] else 0.0
    overlap = {
        name: {**o, "share": o["hits"] / o["of"] if o["of"] else None} for name, o in row["overlap"].items()
    }
    return {
        **row,
        "density": density,
        "density_bf16": density_bf16,
        "relative_norm": relative,
        "overlap": overlap,
    }


def _grouped(rows: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """A row for each role or block."""
    return [
        {key: value, **summed([r for r in rows if r[key] == value])}
        for value in dict.fromkeys(r[key] for r in rows)
    ]


def churn(files: RunFolder) -> list[dict[str, float]]:
    """The steps at which the run replaced trained entries, and the share of them that was new then."""
    found = []
    for line in safe.read_lines(files.metrics):
        with suppress(ValueError):  # a line that was cut short
            if not safe.differs(numbers := safe.parse_json(line), {"step": int, "churn": float}):
                found.append({"step": numbers["step"], "churn": numbers["churn"]})
    return found


@torch.no_grad()
def inspect(path: Path, rank: int = 32, alpha: float = 0.5, gradient: int = 0) -> dict[str, Any]:
    """What there is to say about the run at ``path``, as plain values: ``total``, ``roles``, ``blocks``, ``layers``, ``others``, ``churn``.

    ``rank``: of the principal subspaces; ``alpha``: the share of the entries that a mask has; ``gradient``: how many training batches a gradient mask
    looks at (0: none; it takes the memory of one gradient). In the result ``mask`` names the count whose entries the overlaps are of. Raises
    ``ConfigError`` for a run that changed no weight of the base.
    """
    setup = rebuild(path)
    files, state = run_of(path)
    name, rest = setup.config.method.name, others(setup)
    counts = [(int((u.after != u.before).sum()), u.before.numel()) for u in updates(setup)]
    if not counts and not rest:
        raise ConfigError(
            f"method={name} changed no weight of the base that can be read, so there is nothing to inspect in {path}."
        )
    sparse = sum(c for c, _ in counts) <= DENSE * sum(n for _, n in counts)
    rows = [shared(measure(u, rank, alpha, sparse)) for u in updates(setup, gradient)]
    step = int(state.name.removeprefix("step-")) if state else read_description(files.delta)["step"]
    return {
        "run": str(files.path), "method": name, "step": step, "dtype": setup.config.model.dtype, "rank": rank, "alpha": alpha,
        "mask": "changed" if sparse else "changed_bf16",
        "total": summed(rows) if rows else None, "roles": _grouped(rows, "role"), "blocks": _grouped(rows, "block"), "layers": rows,
        "others": rest, "churn": churn(files),
        "folder": str(files.path / "inspect" / state.name if state else files.path / "inspect"),
    }  # fmt: skip
