"""Merge a run's base and change into one plain Hugging Face folder, checked before it gets its name.

Each changed weight is formed in float64 and rounded once to the folder's dtype. The folder is then read back
and must give the live model's logits on test data. ``finetune/merge.json`` inside it says what was compared.
If few entries changed, ``finetune/originals.safetensors`` restores the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.settings import ModelConfig
from ..core.attach import check_mergeable, parts, patched, trained_in_place, unpatch
from ..core.structure import structures_of
from ..core.zeros import fingerprint_zeros, settle_zeros
from ..data.encode import collate
from ..errors import ConfigError
from ..models.load import save
from ..models.masks import hold_stored_zeros, write_masks
from ..models.sidecar import multiply_out
from ..storage import manifest
from ..storage.atomic import write_json_atomic
from ..training.prepare import Setup
from . import unmerge
from .plain import check_free, read, writing_folder
from .reopen import rebuild

# The largest difference of a logit, by the dtype that weights or products are rounded to.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.02}
PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ABOUT = f"{unmerge.FOLDER}/{unmerge.ABOUT}"
BATCHES, EXAMPLES = 4, 16  # test data for which logits are compared


def merge(
    path: Path,
    out: Path,
    dtype: str | None = None,
    tolerance: float | None = None,
    dense: bool = False,
) -> dict[str, Any]:
    """Write the merged model to ``out``, with weights in ``dtype`` (by default the base's).

    ``tolerance``: the largest difference of a logit; by default it follows from ``dtype`` and from the
    precision in which the live model computes. ``dense``: multiply the structures of the base out, so that
    the folder is a plain one. Returns what was compared. Raises ``ConfigError``, with nothing written, if a
    difference is larger, if ``out`` is in use, or if the method cannot be merged.
    """
    check_free(out)
    setup = rebuild(path)
    config, model = setup.config, setup.session.model
    if not config.method.mergeable:
        raise ConfigError(
            f"method={config.method.name} cannot be merged: it changes more than weights. "
            f"Use the run itself, {path}; finetune.load gives its model in Python."
        )
    check_mergeable(setup.session.states)
    if dense and not structures_of(model):
        raise ConfigError(
            f"--dense has no effect: the base of {path}, {config.model.path}, has no structures. "
            "Leave it out."
        )
    dtype = dtype or config.model.dtype
    if tolerance is None:
        tolerance = default_tolerance(dtype, config.train.precision)
    live = live_logits(setup)
    layers = fold(setup, getattr(torch, dtype))
    if dense:
        multiply_out(model)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    with writing_folder(out) as temporary:
        save(model, setup.base.processor, temporary)
        obstacle = "the structures of the base were multiplied out" if dense else ""
        stored = unmerge.store(setup, temporary / unmerge.FOLDER, obstacle)
        write_masks(model, temporary, config.model)
        loaded = read(temporary, setup.base.task, dtype)
        _check_same_weights(model, loaded)
        _check_same_zeros(model, loaded, temporary)
        loaded = loaded.to(setup.session.accelerator.device)
        found = compare(live, plain_logits(loaded, setup, getattr(torch, dtype)))
        check_equal("merged", found, tolerance)
        summary = {
            "method": config.method.name,
            "dtype": dtype,
            **found,
            "tolerance": tolerance,
            "unmerge": stored["unmerge"],
            "layers": layers,
        }
        about = {
            **manifest.HEADER,
            "run": str(path),
            "task": setup.base.task,
            "head": list(setup.base.new_parameters),
        }
        write_json_atomic(temporary / ABOUT, {**about, **stored, **summary})
        manifest.write(temporary / unmerge.FOLDER)
    return {"out": str(out), **summary}


def default_tolerance(dtype: str, precision: str) -> float:
    """Return the largest difference of a logit between weights in ``dtype`` and a run in ``precision``."""
    return max(TOLERANCE[dtype], TOLERANCE[PRECISION[precision]])


def _check_same_weights(model: nn.Module, loaded: nn.Module) -> None:
    """Raise ``ConfigError`` unless every tensor was read back to the bit."""
    found = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        other = found.get(name)
        if other is None or not _same_values(tensor, other):
            raise ConfigError(
                f"The merged folder has other weights when it is read back (first: {name}); "
                "nothing was written."
            )


def _check_same_zeros(model: nn.Module, loaded: nn.Module, folder: Path) -> None:
    """Raise ``ConfigError`` unless the folder's masks hold the same entries at 0."""
    hold_stored_zeros(folder, ModelConfig("merged", str(folder)), loaded)
    if fingerprint_zeros(loaded) != fingerprint_zeros(model):
        raise ConfigError(
            "The merged folder gives other masks of pruned entries when it is read again; "
            "nothing was written."
        )


def _same_values(tensor: Tensor, other: Tensor) -> bool:
    """Compare shapes and values, in the dtype of ``other``."""
    return tensor.shape == other.shape and torch.equal(tensor.cpu().to(other.dtype), other.cpu())


@torch.no_grad()
def fold(setup: Setup, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Write every part's change into the plain model, for good, with all parameters in ``dtype``.

    Returns a row for each parameter that was changed, or that lost precision by rounding: the largest error
    of an entry, and the norm of the error divided by that of the exact weight and by that of the change.
    """
    session, rows = setup.session, list[dict[str, Any]]()
    written = set(trained_in_place(session.states))
    for part in parts(session.states):
        if part.folds_itself:
            session.model.float()  # the part computes in the model's dtype
        written.update(part.folded_parameters())
        part.fold()
    for name, layer in patched(session.model).items():
        exact, change = layer.sum_changes()
        rounded = exact.to(dtype)
        rows.append(_row(name, rounded, exact, change))
        layer.base.weight.data = (rounded.T if layer.transposed else rounded).contiguous()
    unpatch(session.model)
    settle_zeros(session.model)
    for name, parameter in session.model.named_parameters():
        exact = parameter.data
        parameter.data = exact.to(dtype)
        if name in written or not torch.equal(parameter.data.to(exact.dtype), exact):
            rows.append(_row(name, parameter.data, exact.double(), None))
    return rows


def _row(name: str, rounded: Tensor, exact: Tensor, change: Tensor | None) -> dict[str, Any]:
    """Describe the rounding error of one parameter."""
    error = rounded.double() - exact
    norm, norm_of_exact = float(error.norm()), float(exact.norm())
    row = {"layer": name, "largest_error": 0.0, "relative_error": 0.0, "error_of_change": None}
    if error.numel():
        row["largest_error"] = float(error.abs().max())
    if norm_of_exact:
        row["relative_error"] = norm / norm_of_exact
    norm_of_change = 0.0 if change is None else float(change.norm())
    if norm_of_change:
        row["error_of_change"] = norm / norm_of_change
    return row


def live_logits(setup: Setup) -> list[Tensor]:
    """Compute the logits of the first test examples with the parts attached, in the precision of the run."""
    return logits(setup.session.tuned, setup, setup.session.accelerator.autocast())


def plain_logits(model: nn.Module, setup: Setup, dtype: torch.dtype) -> list[Tensor]:
    """Compute the logits of the same examples with a plain model whose weights are of ``dtype``."""
    device = setup.session.accelerator.device.type
    narrow = dtype != torch.float32
    autocast = torch.autocast(device, dtype if narrow else None, enabled=narrow)
    return logits(model, setup, autocast)


@torch.no_grad()
def logits(model: nn.Module, setup: Setup, autocast: AbstractContextManager[Any]) -> list[Tensor]:
    """Compute the ``logits`` that a model gives for the first test examples, float32, on the CPU."""
    setup.session.tuned.eval()
    with autocast:
        found = [model(**setup.session.compute.on_device(batch)).logits for batch in _batches(setup)]
    return [each.float().cpu() for each in found]


def _batches(setup: Setup) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of the first test examples."""
    data = setup.data["test"]
    for start in range(0, min(len(data), BATCHES * EXAMPLES), EXAMPLES):
        stop = min(start + EXAMPLES, len(data))
        yield collate([data[i] for i in range(start, stop)]).inputs


def compare(live: list[Tensor], other: list[Tensor]) -> dict[str, float]:
    """Return the largest difference of a logit (NaN if there is a NaN) and the share of equal predictions."""
    differences, equal, count = [], 0, 0
    for a, b in zip(live, other, strict=True):
        differences.append((a - b).abs().max())
        equal += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += a[..., 0].numel()
    return {
        "largest_logit_difference": float(torch.stack(differences).max()),
        "same_predictions": equal / count,
    }


def check_equal(name: str, found: dict[str, float], tolerance: float) -> None:
    """Raise ``ConfigError`` if logits differ by more than ``tolerance``. ``name``: for the message."""
    difference = found["largest_logit_difference"]
    if not difference <= tolerance:  # true for NaN as well
        raise ConfigError(
            f"The {name} model's logits differ from the unmerged one's by {difference:.3g}, more than "
            f"--tolerance {tolerance:g}; nothing was written. {found['same_predictions']:.1%} of the "
            "predictions agree. Take a wider --dtype, or a larger --tolerance."
        )
