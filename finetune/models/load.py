"""Load pretrained models from a folder or the hub's cache, and save models as plain folders.

A model for a task with labels keeps the checkpoint's head or gets a new one, as ``model.head`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.settings import ModelConfig
from ..core.roles import in_head, is_recognised
from ..errors import ConfigError
from .folder import AUTO, check_fits, check_weights, find_folder, read_json
from .head import HeadMismatch, initialize_head_, keep_head_
from .masks import hold_stored_zeros
from .processor import read_processor
from .scratch import cannot_be_built, draw
from .sidecar import locate, make_class, read_structures, swap, write_structures
from .stored import StoredParameters, find_stored, hash_parameters, name_parameters

SPARE_ENTRIES = 2**26  # entries that a model may have beyond twice those of its checkpoint: a head, buffers


@dataclass
class Base:
    """A pretrained model in eval mode with all parameters frozen, and its image processor or tokenizer.

    ``head`` names the parameters of the task's head; it is empty for language models. ``new_head``: they are
    newly initialized and must be trained; otherwise they have the checkpoint's values. ``notes`` are for the
    user. ``reload_args`` (configuration, labels, seed) let ``original_parameters`` read the model a second
    time. ``fingerprint`` is that of the model as it was loaded, if it was computed. ``stored``: where
    ``original_parameters`` has found every parameter in the checkpoint.
    """

    model: Any
    processor: Any
    task: str
    head: tuple[str, ...]
    source: str
    notes: list[str] = field(default_factory=list)
    reload_args: tuple[ModelConfig, tuple[str, ...], int] | None = field(default=None, repr=False)
    new_head: bool = True
    fingerprint: str | None = None
    stored: StoredParameters | None = field(default=None, repr=False)

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Names of the newly initialized parameters: those of the head, unless it is kept."""
        return self.head if self.new_head else ()


@dataclass(frozen=True)
class Loaded:
    """A frozen model as it was read: the names of its head's parameters, whether they are new, and notes."""

    model: Any
    head: tuple[str, ...]
    new_head: bool
    notes: tuple[str, ...]


def load(config: ModelConfig, task: str, labels: tuple[str, ...], seed: int) -> Base:
    """Return the model of ``config`` for ``task``.

    The same seed gives the same head, whatever other random numbers have been drawn. Raises ``ConfigError``
    for a folder or hub id that is missing, incomplete, damaged or pickled, or whose model does not fit the
    task.
    """
    folder, source = find_folder(config)
    with quiet():
        loaded = read_model(folder, config, task, labels, seed)
        processor, notes = read_processor(folder, config, task, loaded.model)
    if not is_recognised(loaded.model):
        notes.insert(
            0,
            f"The layers of a {loaded.model.config.model_type} have no known roles: "
            "every linear layer but the head has the role 'linear'.",
        )
    return Base(
        loaded.model,
        processor,
        task,
        loaded.head,
        source,
        [*notes, *loaded.notes],
        (config, labels, seed),
        loaded.new_head,
    )


def read_model(folder: Path, config: ModelConfig, task: str, labels: tuple[str, ...], seed: int) -> Loaded:
    """Read a model, with the head that ``model.head`` asks for.

    Its pruned entries are held at 0 where ``model.zeros`` says so. Raises ``ConfigError`` if it does not fit
    the task, if its head must be kept and cannot be, and for masks that do not fit the weights.
    """
    check_fits(folder, config, task)
    if config.head == "keep" and not labels:
        raise ConfigError(
            f"model.head=keep: the data set's task {task} has no labels, so there is no head for them. "
            "Leave model.head out; the output layer of a language model is always kept."
        )
    try:
        if config.init == "random":
            model, info = draw(folder, config, AUTO[task], labels, seed)
        else:
            model, info = _build(folder, config, task, labels, seed)
    except ConfigError:
        raise
    except Exception as error:  # a contradictory config.json can make an architecture raise anything
        raise cannot_be_built(config, error) from error
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
    new_head = True
    if config.init == "random":
        notes.append(f"model.init=random: every weight is drawn from seed={seed}, and none is pretrained.")
    elif labels and config.head != "new":
        settings = read_json(folder / "config.json", config)
        try:
            notes.append(keep_head_(model, head, info, settings, labels, config.head == "keep"))
            new_head = False
        except HeadMismatch as reason:
            if config.head == "keep":
                raise ConfigError(
                    f"model.head=keep: the head of model.path={config.path} cannot be kept: {reason}. "
                    "Take model.head=new to train a new head."
                ) from None
            notes.append(f"The head is newly initialized: {reason}.")
    if new_head:
        initialize_head_({n: p for n, p in model.named_parameters() if n in head}, seed)
    if config.init != "random" and config.zeros != "free":
        note = hold_stored_zeros(folder, config, model)
        if note:
            notes.append(note)
    return Loaded(model.eval().requires_grad_(False), tuple(head), new_head, tuple(notes))


def _build(
    folder: Path, config: ModelConfig, task: str, labels: tuple[str, ...], seed: int
) -> tuple[Any, dict[str, Any]]:
    """Return the model as transformers loads it, and what it could not load."""
    options: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if labels:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: number for number, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return read_pretrained(folder, config, task, options)


def read_pretrained(
    folder: Path, config: ModelConfig, task: str, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the model that transformers loads with ``options``, and what it could not load.

    Layers that the folder stores as structures are replaced before any weight is read. Raises ``ConfigError``
    if the weights are damaged, or far smaller than the model; other faults raise anything.
    """
    import transformers

    stored = check_weights(folder, config)
    structures = read_structures(folder, config)
    auto: Any = getattr(transformers, AUTO[task])
    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        described = auto.from_config(settings, trust_remote_code=False)
    located = locate(described, structures, config)
    swap(described, located)
    _check_size(described, config, stored)
    plain = type(described)
    if located:
        auto = make_class(plain, located)
    model, info = auto.from_pretrained(
        folder,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if located:
        model.__class__ = plain
    return model, info


def _check_size(described: Any, config: ModelConfig, stored: int) -> None:
    """Raise ``ConfigError`` if config.json describes a model that is far larger than its weights.

    Initializing the missing weights could exhaust memory. ``described``: the model on the meta device.
    ``stored``: the number of entries in the checkpoint.
    """
    entries = 0
    for tensor in (*described.parameters(), *described.buffers()):
        entries += tensor.numel()
    if entries > 2 * stored + SPARE_ENTRIES:
        raise ConfigError(
            f"model.path={config.path}: its config.json describes {entries:,} entries, and its weights are "
            f"{stored:,}. Choose a checkpoint that is complete and belongs to its config.json."
        )


def reload(base: Base) -> Any:
    """Read the model from its source again, and return it as ``load`` returned it."""
    if base.reload_args is None:
        raise ValueError("this Base was not made by load(), so it has no source to read again")
    config, labels, seed = base.reload_args
    with quiet():
        return read_model(find_folder(config)[0], config, base.task, labels, seed).model


def original_parameters(base: Base) -> Iterator[tuple[str, Tensor]]:
    """Read the model from its source again, and yield its parameters as ``load`` returned them.

    Names and order are those of ``named_parameters``. One tensor at a time is read where the checkpoint
    stores them all under these names, and ``base.fingerprint`` shows that their values are the same.
    Otherwise the whole model is read.
    """
    base.stored = base.stored or _find_originals(base)
    if base.stored:
        for name in [name for name, _ in name_parameters(base.model)]:
            yield name, base.stored.read(name)
        return
    for name, parameter in reload(base).named_parameters():
        yield name, parameter.detach()


def _find_originals(base: Base) -> StoredParameters | None:
    """Return the checkpoint's parameters if they are, one by one, those that the model was loaded with."""
    if base.reload_args is None or base.fingerprint is None:
        return None
    config, _, seed = base.reload_args
    if config.init == "random":
        return None
    dtype = getattr(torch, config.dtype)
    shapes, new = dict[str, tuple[int, ...]](), dict[str, Tensor]()
    for name, parameter in name_parameters(base.model):
        shapes[name] = tuple(parameter.shape)
        if name in base.new_parameters:
            new[name] = torch.empty(parameter.shape, dtype=dtype)
    initialize_head_(new, seed)
    stored = find_stored(find_folder(config)[0], config, shapes, new)
    if stored is None or hash_parameters(shapes, stored.read, base.new_parameters) != base.fingerprint:
        return None
    return stored


def save(model: Any, processor: Any, out: Path) -> None:
    """Write a Hugging Face folder: configuration, safetensors, processor, and the structures of layers."""
    with quiet():
        model.save_pretrained(out)
        processor.save_pretrained(out)
    write_structures(model, out)


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
