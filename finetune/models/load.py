"""Load pretrained models from a folder or the hub's cache, and save models as plain folders.

A model for a task with labels gets a new head.
"""

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
from .folder import check_fits, check_weights, find_folder
from .processor import read_processor

AUTO = {
    "image_classification": "AutoModelForImageClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}
SPARE_ENTRIES = 2**26  # entries that a model may have beyond twice those of its checkpoint: a head, buffers


@dataclass
class Base:
    """A pretrained model in eval mode with all parameters frozen, and its image processor or tokenizer.

    ``head`` names the newly initialized parameters, which must be trained; it is empty for language models.
    ``notes`` are for the user. ``reload_args`` (configuration, labels, seed) let ``original_parameters`` read
    the model a second time.
    """

    model: Any
    processor: Any
    task: str
    head: tuple[str, ...]
    source: str
    notes: list[str] = field(default_factory=list)
    reload_args: tuple[ModelConfig, tuple[str, ...], int] | None = field(default=None, repr=False)


def load(config: ModelConfig, task: str, labels: tuple[str, ...], seed: int) -> Base:
    """Return the model of ``config`` for ``task``.

    The same seed gives the same head, whatever other random numbers have been drawn. Raises ``ConfigError``
    for a folder or hub id that is missing, incomplete, damaged or pickled, or whose model does not fit the
    task.
    """
    folder, source = find_folder(config)
    with quiet():
        model, head, notes = read_model(folder, config, task, labels, seed)
        processor, processor_notes = read_processor(folder, config, task, model)
    if not is_recognised(model):
        notes.append(
            f"The layers of a {model.config.model_type} have no known roles: "
            "every linear layer but the head has the role 'linear'."
        )
    return Base(model, processor, task, head, source, notes + processor_notes, (config, labels, seed))


def read_model(
    folder: Path, config: ModelConfig, task: str, labels: tuple[str, ...], seed: int
) -> tuple[Any, tuple[str, ...], list[str]]:
    """Return the frozen model, the names of its head's parameters, and notes."""
    check_fits(folder, config, task)
    try:
        _check_size(folder, config, task, check_weights(folder, config))
        model, info = _build(folder, config, task, labels, seed)
    except ConfigError:
        raise
    except Exception as error:  # a contradictory config.json can make an architecture raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"model.path={config.path} cannot be built ({type(error).__name__}: {reason}). "
            "Check its config.json."
        ) from error
    not_loaded = set(info["missing_keys"])
    for key, *_ in info["mismatched_keys"]:
        not_loaded.add(key)
    head, lost, notes = [], [], []
    for name, _ in model.named_parameters():
        is_new_pooler = name in not_loaded and "pooler" in name
        if (labels and in_head(model, name)) or is_new_pooler:
            head.append(name)
            if "pooler" in name:
                notes.append(
                    f"The checkpoint has no {name}: it is newly initialized and trained with the head."
                )
        elif name in not_loaded:
            lost.append(name)
    if lost:
        raise ConfigError(
            f"model.path={config.path}: {len(lost)} weights of a {type(model).__name__} are missing or of "
            f"another shape (first: {lost[0]}). "
            "Choose a checkpoint that is complete and belongs to its config.json."
        )
    start_head_(model, head, seed)
    return model.eval().requires_grad_(False), tuple(head), notes


def _build(
    folder: Path, config: ModelConfig, task: str, labels: tuple[str, ...], seed: int
) -> tuple[Any, dict[str, Any]]:
    """Return the model as transformers loads it, and what it could not load."""
    import transformers

    options: dict[str, Any] = {}
    if labels:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: number for number, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = getattr(transformers, AUTO[task]).from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    return model, info


def _check_size(folder: Path, config: ModelConfig, task: str, stored: int) -> None:
    """Raise ``ConfigError`` if config.json describes a model that is far larger than its weights.

    Initializing the missing weights could exhaust memory. ``stored`` is the number of entries in the
    checkpoint.
    """
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = getattr(transformers, AUTO[task]).from_config(settings, trust_remote_code=False)
    described = 0
    for tensor in (*model.parameters(), *model.buffers()):
        described += tensor.numel()
    if described > 2 * stored + SPARE_ENTRIES:
        raise ConfigError(
            f"model.path={config.path}: its config.json describes {described:,} entries, and its weights are "
            f"{stored:,}. Choose a checkpoint that is complete and belongs to its config.json."
        )


@torch.no_grad()
def start_head_(model: nn.Module, names: Collection[str], seed: int) -> None:
    """Initialize the named parameters in place: matrices from N(0, 0.02), biases with 0, scales with 1.

    The generator is seeded here, so that every method starts from the same head.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in names and parameter.ndim > 1:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        elif name in names:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def reload(base: Base) -> Any:
    """Read the model from its source again, and return it as ``load`` returned it."""
    if base.reload_args is None:
        raise ValueError("this Base was not made by load(), so it has no source to read again")
    config, labels, seed = base.reload_args
    with quiet():
        return read_model(find_folder(config)[0], config, base.task, labels, seed)[0]


def original_parameters(base: Base) -> Iterator[tuple[str, Tensor]]:
    """Read the model from its source again, and yield its parameters as ``load`` returned them.

    Names and order are those of ``named_parameters``.
    """
    for name, parameter in reload(base).named_parameters():
        yield name, parameter.detach()


def fingerprint(model: nn.Module, skip: Collection[str]) -> str:
    """Return the SHA-256 (hex) of the names, shapes, dtypes and bytes of all parameters but ``skip``.

    The parameters are sorted by name. Patched layers do not change the result.
    """
    total = hashlib.sha256()
    parameters = [(name.replace(".base.", "."), parameter) for name, parameter in model.named_parameters()]
    for name, parameter in sorted(parameters):
        if name not in skip:
            data: Any = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            total.update(data)
    return total.hexdigest()


def save(model: Any, processor: Any, out: Path) -> None:
    """Write a plain Hugging Face folder: configuration, safetensors and processor."""
    with quiet():
        model.save_pretrained(out)
        processor.save_pretrained(out)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers, and restore its settings afterwards."""
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
