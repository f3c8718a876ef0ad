"""A run's base and change as one plain Hugging Face folder, proved before it has its name.

Each changed weight is formed in float64 and rounded once to the folder's type. The folder is then read again and must give the live model's logits on
test data. ``finetune/merge.json`` in it says what was compared; ``finetune/originals.safetensors`` leads back to the base where few entries changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.part import check_mergeable, parts, patched, trained_in_place, unpatch
from ..data.encode import collate
from ..errors import ConfigError
from ..models.load import save
from ..storage import manifest
from ..storage.atomic import write_json_atomic
from ..training.prepare import Setup
from . import unmerge
from .plain import check_free, read, writing_folder
from .reopen import rebuild

TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.2,
    "float16": 0.02,
}  # of logits, by the type that weights or products are rounded to
PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ABOUT = f"{unmerge.FOLDER}/{unmerge.ABOUT}"
BATCHES, EXAMPLES = 4, 16  # the test data that logits are compared on


def merge(path: Path, out: Path, dtype: str | None = None, tolerance: float | None = None) -> dict[str, Any]:
    """Write the merged model to ``out``, its weights in ``dtype`` (by default the base's). Returns what was compared.

    ``tolerance``: the largest difference of a logit; by default by ``dtype`` and by the precision that the live model computes in. Raises
    ``ConfigError`` above it and for an ``out`` in use, with nothing written.
    """
    check_free(out)
    setup = rebuild(path)
    config, model = setup.config, setup.session.model
    if not config.method.mergeable:
        raise ConfigError(f"method={config.method.name} cannot be merged: it changes more than weights.")
    check_mergeable(setup.session.states)
    dtype = dtype or config.model.dtype
    tolerance = (
        max(TOLERANCE[dtype], TOLERANCE[PRECISION[config.train.precision]])
        if tolerance is None
        else tolerance
    )
    live = live_logits(setup)
    layers = fold(setup, getattr(torch, dtype))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    with writing_folder(out) as temporary:
        save(model, setup.base.processor, temporary)
        stored = unmerge.store(setup, temporary / unmerge.FOLDER)
        again = read(temporary, setup.base.task, dtype)
        lost = [
            name
            for name, tensor in model.state_dict().items()
            if not _same(tensor, again.state_dict().get(name))
        ]
        if lost:
            raise ConfigError(
                f"The merged folder gives other weights when it is read again (first: {lost[0]}); nothing was written."
            )
        found = compare(
            live, plain_logits(again.to(setup.session.accelerator.device), setup, getattr(torch, dtype))
        )
        check_equal("merged", found, tolerance)
        told = {
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
            "head": list(setup.base.head),
            **stored,
            **told,
        }
        write_json_atomic(temporary / ABOUT, about)
        manifest.write(temporary / unmerge.FOLDER)
    return {"out": str(out), **told}


@torch.no_grad()
def fold(setup: Setup, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Put every part's change into the plain model, for good, with all parameters in ``dtype``.

    Returns a row for each parameter that was changed or lost by rounding: the largest error of an entry, and the error's norm over those of the exact
    weight and of the change.
    """
    session, rows = setup.session, list[dict[str, Any]]()
    for part in parts(session.states):
        if part.folds_itself:
            session.model.float()  # the part computes in the model's dtype
        part.fold()
    for name, layer in patched(session.model).items():
        change = torch.zeros(layer.original.shape, dtype=torch.float64, device=layer.original.device)
        for delta in layer.deltas:
            change += delta.gate * delta(layer.original).double()
        exact = layer.original.double() + change
        rounded = exact.to(dtype)
        rows.append(_row(name, rounded, exact, change))
        layer.base.weight.data = (rounded.T if layer.transposed else rounded).contiguous()
    unpatch(session.model)
    in_place = trained_in_place(session.states)
    for name, parameter in session.model.named_parameters():
        exact = parameter.data
        parameter.data = exact.to(dtype)
        if name in in_place or not torch.equal(parameter.data.to(exact.dtype), exact):
            rows.append(_row(name, parameter.data, exact.double(), None))
    return rows


def _row(name: str, rounded: Tensor, exact: Tensor, change: Tensor | None) -> dict[str, Any]:
    error, size, moved = (
        rounded.double() - exact,
        float(exact.norm()),
        float(change.norm()) if change is not None else 0.0,
    )
    norm = float(error.norm())
    return {
        "layer": name,
        "largest_error": float(error.abs().max()) if error.numel() else 0.0,
        "relative_error": norm / size if size else 0.0,
        "error_of_change": norm / moved if moved else None,
    }


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a.cpu().to(b.dtype), b.cpu())


def live_logits(setup: Setup) -> list[Tensor]:
    """Of the first test examples, by the model with its parts attached, in the precision of its run."""
    return logits(lambda **inputs: setup.session.tuned(**inputs), setup, setup.session.accelerator.autocast())


def plain_logits(model: nn.Module, setup: Setup, dtype: torch.dtype) -> list[Tensor]:
    """Of the same examples by a model whose weights are of ``dtype``."""
    narrow = dtype != torch.float32
    autocast = torch.autocast(
        setup.session.accelerator.device.type, dtype if narrow else None, enabled=narrow
    )
    return logits(lambda **inputs: model(**inputs).logits, setup, autocast)


@torch.no_grad()
def logits(
    answer: Callable[..., Tensor], setup: Setup, autocast: AbstractContextManager[Any]
) -> list[Tensor]:
    """Of the first test examples, float32 on the CPU."""
    setup.session.tuned.eval()
    with autocast:
        return [answer(**setup.session.compute.on_device(batch)).float().cpu() for batch in _batches(setup)]


def _batches(setup: Setup) -> Iterator[dict[str, Tensor]]:
    data = setup.data["test"]
    for start in range(0, min(len(data), BATCHES * EXAMPLES), EXAMPLES):
        yield collate([data[i] for i in range(start, min(start + EXAMPLES, len(data)))]).inputs


def compare(live: list[Tensor], other: list[Tensor]) -> dict[str, float]:
    """The largest difference of a logit (NaN where one is not a number), and the share of equal predictions."""
    difference = torch.stack([(a - b).abs().max() for a, b in zip(live, other, strict=True)]).max()
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(live, other, strict=True))
    return {
        "largest_logit_difference": float(difference),
        "same_predictions": same / sum(a[..., 0].numel() for a in live),
    }


def check_equal(what: str, found: dict[str, float], tolerance: float) -> None:
    """Raise ``ConfigError`` above ``tolerance``."""
    difference = found["largest_logit_difference"]
    if not difference <= tolerance:
        raise ConfigError(
            f"The {what} model's logits differ from the unmerged one's by {difference:.3g}, more than --tolerance {tolerance:g}; "
            f"nothing was written. {found['same_predictions']:.1%} of the predictions agree. Take a wider --dtype, or a larger --tolerance."
        )
