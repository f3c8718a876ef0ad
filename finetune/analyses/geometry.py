"""Update geometry: how much a finished run changed, where, along which directions, and in which entries.

The update of a layer is the weight that merging would write, minus the pretrained weight. The measures follow
"The Path Not Taken" (arXiv 2511.08567): changed entries, spectrum, principal angles, and overlap with masks
made from the pretrained weight alone. One matrix is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ..core.analysis import Analysis, Subject, Table
from ..core.attach import base, patched, trained_in_place
from ..core.linalg import kth_smallest
from ..core.loss import count, example_losses
from ..core.site import Site, all_sites
from ..errors import ConfigError
from ..registry import register
from ..report.inspection import make_plots, summarise
from ..storage.run_folder import RunFolder
from ..system import safe
from ..training.prepare import Setup

ETA = 1e-3  # the paper's tolerance; adjacent bfloat16 numbers are further apart
# If more than this share of the entries changed, overlaps count only changes that are visible in bfloat16. If
# all changes counted, every overlap would be near chance.
DENSE = 0.5


def mask_unchanged(w0: Tensor, w1: Tensor) -> Tensor:
    """Return where two weights are equal in bfloat16 (definition 2.1 of the paper).

    That is |w1 - w0| <= eta max(|w0|, |w1|) after both are rounded to bfloat16.
    """
    a, b = w0.to(torch.bfloat16).float(), w1.to(torch.bfloat16).float()
    return (b - a).abs() <= ETA * torch.maximum(a.abs(), b.abs())


def mask_largest(score: Tensor, k: int) -> Tensor:
    """Return the mask of the ``k`` largest entries. Among equal entries the first ones are taken."""
    flat = score.reshape(-1)
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    cut = kth_smallest(flat, len(flat) - k)
    mask = flat > cut
    mask[(flat == cut).nonzero().view(-1)[: k - int(mask.sum())]] = True
    return mask.view(score.shape)


@dataclass(frozen=True)
class Spectrum:
    """All singular values, descending, and the first k singular vectors as columns, float64."""

    sigma: Tensor
    left: Tensor
    right: Tensor


def _gram(w: Tensor) -> Tensor:
    """Return the smaller of the two Gram matrices, float64."""
    wide = w.double()
    if w.shape[0] >= w.shape[1]:
        return wide.T @ wide
    return wide @ wide.T


def spectrum(w: Tensor, k: int) -> Spectrum:
    """Compute the spectrum of ``w`` from the eigenvectors of the smaller Gram matrix in float64.

    That is several times faster than an SVD, and exact to about 1e-8 of the largest value.
    """
    values, vectors = torch.linalg.eigh(_gram(w))
    sigma = values.clamp(min=0).sqrt().flip(0)
    short = vectors.flip(1)[:, :k]
    # The other side's vectors are orthonormal even if the rank is below k.
    if w.shape[0] >= w.shape[1]:
        return Spectrum(sigma, torch.linalg.qr(w.double() @ short).Q, short)
    return Spectrum(sigma, short, torch.linalg.qr(w.double().T @ short).Q)


def singular_values(w: Tensor) -> Tensor:
    """Return the singular values, descending, float64, with the accuracy of ``spectrum``."""
    values: Tensor = torch.linalg.eigvalsh(_gram(w))
    return values.clamp(min=0).sqrt().flip(0)


def largest_angle(a: Tensor, b: Tensor) -> float:
    """Return the largest principal angle between the spans of orthonormal columns, in degrees."""
    overlap = a.T @ b
    sine = torch.linalg.matrix_norm(b - a @ overlap, 2)
    cosine = torch.linalg.svdvals(overlap)[-1]
    return math.degrees(math.atan2(float(sine), float(cosine)))


def effective_rank(sigma: Tensor) -> float:
    """Return exp of the entropy of the singular values divided by their sum; 0 for a matrix of zeros."""
    p = sigma[sigma > 0] / sigma.sum()
    if not len(p):
        return 0.0
    return float(torch.exp(-(p * p.log()).sum()))


def masks(w0: Tensor, basis: Spectrum, alpha: float) -> dict[str, Tensor]:
    """Return the paper's masks of a pretrained weight, ``principal`` and ``low`` with a share ``alpha`` each.

    ``principal``: the largest entries of its rank-k approximation. ``low``: its own smallest entries.
    ``principal_not_low``: the principal entries that are not low.
    """
    count, rank = round(alpha * w0.numel()), basis.left.shape[1]
    approximation = w0
    if rank < min(w0.shape):
        approximation = (basis.left @ (basis.left.T @ w0.double())).float()
    principal, low = mask_largest(approximation.abs(), count), ~mask_largest(w0.abs(), w0.numel() - count)
    return {"principal": principal, "low": low, "principal_not_low": principal & ~low}


@dataclass(frozen=True)
class Update:
    """One layer's weight before and after, in the model's dtype, and the loss gradient, if requested."""

    site: Site
    before: Tensor
    after: Tensor
    grad: Tensor | None = None


def measure(update: Update, k: int, alpha: float, sparse: bool) -> dict[str, Any]:
    """Measure one layer.

    ``k``: rank of the principal subspaces. ``alpha``: see ``masks``. ``sparse``: measure overlaps with all
    changed entries; otherwise only with those whose change is visible in bfloat16.
    """
    w0, w1 = update.before.float(), update.after.float()
    changed, shown, change = update.after != update.before, ~mask_unchanged(w0, w1), w1 - w0
    entries, k = w0.numel(), min(k, *w0.shape)
    old = spectrum(w0, k)
    counted = changed if sparse else shown
    total = int(counted.sum())
    found = masks(w0, old, alpha) | {"magnitude": mask_largest(w0.abs(), total)}
    if update.grad is not None:
        found["gradient"] = mask_largest(update.grad.abs(), total)
    overlap = {}
    for name, mask in found.items():
        hits = int((mask & counted).sum())
        overlap[name] = {"hits": hits, "of": total, "chance": int(mask.sum()) / entries}
    return {
        "layer": update.site.name,
        "role": update.site.role,
        "block": update.site.block,
        "shape": list(w0.shape),
        "entries": entries,
        "changed": int(changed.sum()),
        "changed_bf16": int(shown.sum()),
        "change_norm": float(change.double().norm()),
        "weight_norm": float(w0.double().norm()),
        **_compare_spectra(old, w1, change, k),
        "overlap": overlap,
    }


def _compare_spectra(old: Spectrum, w1: Tensor, change: Tensor, k: int) -> dict[str, float]:
    """Measure the spectrum of the change, and how the weight's spectrum and principal subspaces moved.

    ``gap``: (sigma_k - sigma_k+1) / sigma_1 of the pretrained weight. If it is near 0, the angles say little.
    """
    sigma_1 = float(old.sigma[0])
    if not change.any() or not sigma_1:
        names = ("effective_rank", "stable_rank", "nss", "angle_left", "angle_right", "gap")
        return dict.fromkeys(names, 0.0)
    new, sigma = spectrum(w1, k), singular_values(change)
    after_k = float(old.sigma[k]) if k < len(old.sigma) else 0.0
    return {
        "effective_rank": effective_rank(sigma),
        "stable_rank": float(sigma.square().sum() / sigma[0].square()),
        "nss": float((new.sigma - old.sigma).norm() / old.sigma.norm()),
        "angle_left": largest_angle(old.left, new.left),
        "angle_right": largest_angle(old.right, new.right),
        "gap": (float(old.sigma[k - 1]) - after_k) / sigma_1,
    }


def updates(setup: Setup, gradient: int = 0) -> Iterator[Update]:
    """Yield the layers that a rebuilt run may have changed, in the model's order, without the new head.

    ``gradient``: number of training batches for the loss gradient; 0: none.
    """
    session, new = setup.session, set(setup.base.new_parameters)
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
            name = f"{site.name}.weight"
            if name in trained and site.name not in layers:
                before = site.as_matrix(site.module.get_parameter("weight"))
                after = site.as_matrix(trained[name]).to(before.dtype)
                yield Update(site, before, after, grads.get(site.name))


def others(setup: Setup) -> list[dict[str, Any]]:
    """Measure other parameters trained in place, such as embeddings, norms and biases, but no new head."""
    session = setup.session
    skipped = {f"{site.name}.weight" for site in all_sites(session.model)} | set(setup.base.new_parameters)
    trained = {}
    for name, parameter in trained_in_place(session.states).items():
        if _plain_name(name) not in skipped:
            trained[_plain_name(name)] = parameter.detach()
    rows = []
    with base(session.states):
        for patched_name, before in session.model.named_parameters():
            name = _plain_name(patched_name)
            if name not in trained:
                continue
            after = trained[name].to(before.dtype)
            change, weight = (after.double() - before.double()).norm(), before.double().norm()
            rows.append(
                {
                    "parameter": name,
                    "entries": before.numel(),
                    "changed": int((after != before).sum()),
                    "relative_norm": _divide(float(change), float(weight), None),
                }
            )
    return rows


def _divide(part: float, whole: float, if_empty: float | None) -> float | None:
    """Return ``part / whole``; ``if_empty`` if ``whole`` is 0."""
    return part / whole if whole else if_empty


def _plain_name(name: str) -> str:
    """Return a parameter's name in the model without patched layers."""
    return name.replace(".base.", ".")


@torch.enable_grad()
def _gradients(setup: Setup, steps: int) -> dict[str, Tensor]:
    """Return the gradient of the untrained model's loss on the first batches, by layer, [out, in]."""
    session = setup.session
    with base(session.states):
        frozen: dict[str, tuple[Site, nn.Parameter]] = {}
        for site in all_sites(session.model):
            weight = site.module.get_parameter("weight")
            if not weight.requires_grad:
                frozen[site.name] = site, weight
        session.tuned.eval()
        for _, weight in frozen.values():
            weight.requires_grad_(True)
        for micro_batches in session.batches.steps(0, steps):
            for batch in micro_batches:
                if batch is None:
                    continue
                with session.accelerator.autocast():
                    logits = session.tuned(**session.compute.on_device(batch.inputs)).logits
                losses = example_losses(logits, batch.labels.to(logits.device))
                (losses.sum() / count(batch.labels)).backward()
        found = {}
        for name, (site, weight) in frozen.items():
            if weight.grad is not None:
                found[name] = site.as_matrix(weight.grad).float()
            weight.requires_grad_(False)
            weight.grad = None
    return found


COLUMNS = ("layer", "density", "relative_norm", "effective_rank", "nss")  # as many as fit a terminal
MEANS = ("effective_rank", "stable_rank", "nss", "angle_left", "angle_right")


def sum_measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize several layers in one row.

    Counts and squared norms are added; ranks, NSS and angles are averaged; an overlap is that of all layers
    together.
    """
    found: dict[str, Any] = {"layers": len(rows)}
    for key in ("entries", "changed", "changed_bf16"):
        found[key] = sum(row[key] for row in rows)
    for key in ("change_norm", "weight_norm"):
        found[key] = math.sqrt(sum(row[key] ** 2 for row in rows))
    for key in MEANS:
        found[key] = sum(row[key] for row in rows) / len(rows)
    overlap = {}
    for name in rows[0]["overlap"]:
        hits, total, expected = 0, 0, 0.0
        for row in rows:
            part = row["overlap"][name]
            hits += part["hits"]
            total += part["of"]
            expected += part["chance"] * part["of"]
        overlap[name] = {"hits": hits, "of": total, "chance": _divide(expected, total, 0.0)}
    return shared({**found, "overlap": overlap})


def shared(row: Mapping[str, Any]) -> dict[str, Any]:
    """Add the shares that follow from a row's counts."""
    overlap = {}
    for name, counts in row["overlap"].items():
        overlap[name] = {**counts, "share": _divide(counts["hits"], counts["of"], None)}
    return {
        **row,
        "density": row["changed"] / row["entries"],
        "density_bf16": row["changed_bf16"] / row["entries"],
        "relative_norm": _divide(row["change_norm"], row["weight_norm"], 0.0),
        "overlap": overlap,
    }


def _grouped(rows: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return a row for each role or block."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return [{key: value, **sum_measures(members)} for value, members in groups.items()]


def churn(files: RunFolder) -> list[dict[str, float]]:
    """Return the steps at which the run replaced trained entries, and the share of new ones."""
    found = []
    for line in safe.read_lines(files.metrics):
        with suppress(ValueError):  # a line that was cut short
            numbers = safe.parse_json(line)
            if not safe.find_mismatch(numbers, {"step": int, "churn": float}):
                found.append({"step": numbers["step"], "churn": numbers["churn"]})
    return found


@register("geometry")
@dataclass(frozen=True)
class Geometry(Analysis):
    """Update geometry: how much a run changed, where, and along which directions.

    Options:
        rank: Number of singular directions that count as principal.
        alpha: Share of the entries in the principal and in the low mask.
        gradient: Number of training batches for a mask of the largest gradients; 0: none. It needs the memory
            of one gradient.
    """

    rank: Annotated[int, Ge(1)] = 32
    alpha: Annotated[float, Ge(0.001), Le(0.999)] = 0.5
    gradient: Annotated[int, Ge(0)] = 0

    @torch.no_grad()
    def __call__(self, *subjects: Subject) -> Table:
        """Measure one run, with a row for each layer.

        In ``details``, ``mask`` names the set of entries whose overlaps are measured; ``total``, ``roles``,
        ``blocks``, ``layers`` and ``others`` hold the measures, and ``churn`` the replaced entries. Raises
        ``ConfigError`` for a run that changed no weight of the base.
        """
        (subject,) = subjects
        details = self._measure(subject)
        total = details["total"]
        summary: dict[str, Any] = {}
        if total is not None:
            summary = {key: value for key, value in total.items() if key != "overlap"}
            summary |= {f"overlap_{name}": counts["share"] for name, counts in total["overlap"].items()}
        rows = []
        for layer in details["layers"]:
            rows.append({key: layer[key] for key in COLUMNS})
        return Table(rows, summary, details, summarise(details), make_plots(details))

    def _measure(self, subject: Subject) -> dict[str, Any]:
        """Return all measures of a run."""
        setup, files = subject.open(), RunFolder(subject.folder)
        name, rest = setup.config.method.name, others(setup)
        changed = entries = 0
        for update in updates(setup):
            changed += int((update.after != update.before).sum())
            entries += update.before.numel()
        if not entries and not rest:
            raise ConfigError(
                f"method={name} changed no weight of the base that can be read, so there is nothing to "
                f"inspect in {subject.path}."
            )
        sparse = changed <= DENSE * entries
        rows = []
        for update in updates(setup, self.gradient):
            rows.append(shared(measure(update, self.rank, self.alpha, sparse)))
        return {
            "method": name,
            "step": subject.step,
            "dtype": setup.config.model.dtype,
            "rank": self.rank,
            "alpha": self.alpha,
            "mask": "changed" if sparse else "changed_bf16",
            "total": sum_measures(rows) if rows else None,
            "roles": _grouped(rows, "role"),
            "blocks": _grouped(rows, "block"),
            "layers": rows,
            "others": rest,
            "churn": churn(files),
        }
