"""Pretrained models: read from a folder or the hub's cache, with a new head where the task needs one; written as plain folders."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.settings import ModelConfig
from ..core.roles import in_head, is_recognised
from ..errors import ConfigError
from .folder import check_fits, check_weights, find
from .processor import read_processor

AUTO = {
    "image_classification": "AutoModelForImageClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}
SPARE = 2**26  # entries that a model may have beyond twice those of its checkpoint: a head, buffers


@dataclass
class Base:
    """A pretrained model in eval mode, all of it frozen, and its processor (of images, or a tokenizer).

    ``head`` names the parameters that start anew and must be trained; () for language models. ``notes`` is what a user should be told.
    """

    model: Any
    processor: Any
    task: str
    head: tuple[str, ...]
    source: str
    notes: list[str] = field(default_factory=list)
    # What `original_parameters` needs to read the model from its source a second time: config, labels, seed.
    reload_args: tuple[ModelConfig, tuple[str, ...], int] | None = field(default=None, repr=False)


def load(config: ModelConfig, task: str, labels: tuple[str, ...], seed: int) -> Base:
    """The model of ``config`` for ``task``; the same seed gives the same head whatever else has drawn random numbers.

    Raises ``ConfigError`` for a folder or hub id that is missing, incomplete, damaged, pickled, or of a model that does not fit the task.
    """
    folder, source = find(config)
    with quiet():
        model, head, notes = read_model(folder, config, task, labels, seed)
        processor, said = read_processor(folder, config, task, model)
    if not is_recognised(model):
        notes.append(
            f"The layers of a {model.config.model_type} have no names here: every linear layer but the head has the role 'linear'."
        )
    return Base(model, processor, task, head, source, notes + said, (config, labels, seed))


def read_model(
    folder: Path, config: ModelConfig, task: str, labels: tuple[str, ...], seed: int
) -> tuple[Any, tuple[str, ...], list[str]]:
    """The frozen model, the names of its head's parameters, and notes."""
    import transformers

    named: dict[str, Any] = {}
    if labels:
        named = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    check_fits(folder, config, task)
    try:
        _check_size(folder, config, task, check_weights(folder, config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = getattr(transformers, AUTO[task]).from_pretrained(
                folder, dtype=getattr(torch, config.dtype), use_safetensors=True, trust_remote_code=False, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **named,
            )  # fmt: skip
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # a config.json that contradicts itself raises whatever the architecture happens to
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"model.path={config.path} cannot be built ({type(error).__name__}: {reason}). Check its config.json."
        ) from error
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    names = [name for name, _ in model.named_parameters()]
    new = [
        name for name in names if (named and in_head(model, name)) or (name in absent and "pooler" in name)
    ]
    if lost := [name for name in names if name in absent and name not in new]:
        what = f"{len(lost)} weights of a {type(model).__name__} are missing or of another shape (first: {lost[0]})"
        raise ConfigError(
            f"model.path={config.path}: {what}. Choose a checkpoint that is complete and belongs to its config.json."
        )
    start_head_(model, new, seed)
    notes = [
        f"The checkpoint has no {name}: it starts anew and is trained with the head."
        for name in new
        if "pooler" in name
    ]
    return model.eval().requires_grad_(False), tuple(new), notes


def _check_size(folder: Path, config: ModelConfig, task: str, stored: int) -> None:
    """Raise ``ConfigError`` where config.json describes a model far larger than its weights: to make up the rest could take all memory."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = getattr(transformers, AUTO[task]).from_config(settings, trust_remote_code=False)
    described = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if described > 2 * stored + SPARE:
        cure = "Choose a checkpoint that is complete and belongs to its config.json"
        raise ConfigError(
            f"model.path={config.path}: its config.json describes {described:,} entries, and its weights are {stored:,}. {cure}."
        )


@torch.no_grad()
def start_head_(model: nn.Module, names: Collection[str], seed: int) -> None:
    """Matrices from a normal of 0.02, biases 0, scales 1; from a generator of its own, so that every method starts from the same head."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in names and parameter.ndim > 1:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        elif name in names:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def original_parameters(base: Base) -> Iterator[tuple[str, Tensor]]:
    """The parameters as ``load`` gave them, read again from the source, in the order and by the names of ``named_parameters``."""
    if base.reload_args is None:
        raise ValueError("this Base was not made by load(), so it has no source to read again")
    config, labels, seed = base.reload_args
    with quiet():
        model = read_model(find(config)[0], config, base.task, labels, seed)[0]
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def fingerprint(model: nn.Module, skip: Collection[str]) -> str:
    """SHA-256 (hex) over the sorted names, shapes, dtypes and bytes of all parameters but ``skip``; the same with layers patched or not."""
    total = hashlib.sha256()
    for name, parameter in sorted((name.replace(".base.", "."), p) for name, p in model.named_parameters()):
        if name not in skip:
            data: Any = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            total.update(data)
    return total.hexdigest()


def save(model: Any, processor: Any, out: Path) -> None:
    """Write a plain Hugging Face folder: config, safetensors, processor."""
    with quiet():
        model.save_pretrained(out)
        processor.save_pretrained(out)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and only errors from transformers; its verbosity is put back afterwards."""
    import transformers

    logging: Any = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
