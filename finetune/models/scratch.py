"""Build a model with random weights from the config.json of a folder, for ``model.init=random``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config.settings import ModelConfig
from ..errors import ConfigError, suggest_nearest
from .folder import AUTO, TASKS, list_depths, read_json
from .sidecar import fit, locate, read_structures, replace_module, swap

MOST_LAYERS = 1000  # also of experts: building more would take hours
SET_ELSEWHERE = {  # keys of config.json that other settings decide, and which
    "model_type": "model.path",
    "architectures": "model.path",
    "auto_map": "model.path",
    "quantization_config": "model.path",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "num_labels": "dataset",
    "id2label": "dataset",
    "label2id": "dataset",
}


def draw(
    folder: Path, config: ModelConfig, auto: str, labels: tuple[str, ...], seed: int
) -> tuple[Any, dict[str, Any]]:
    """Return a model of the class ``auto`` whose weights are drawn, and that nothing is missing of it.

    The same seed gives the same weights, whatever other random numbers have been drawn. A structure starts as
    the one that fits the drawn weight of its layer, as in arXiv 2105.01029. Raises ``ConfigError`` if a
    setting of ``model.config`` is unknown or of another type, or if the model would not fit into memory.
    """
    import transformers

    settings = make_settings(folder, config, labels)
    auto_class: Any = getattr(transformers, auto)
    with torch.device("meta"):
        described = auto_class.from_config(settings, trust_remote_code=False)
    _check_memory(described, config)
    located = locate(described, read_structures(folder, config, has_weights=False), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(settings, trust_remote_code=False, dtype=getattr(torch, config.dtype))
    for name, structure in located.items():
        replace_module(model, name, fit(structure, model.get_submodule(name)))
    return model, {"missing_keys": (), "mismatched_keys": ()}


def describe(
    folder: Path, config: ModelConfig, wanted: str | None = None, labels: tuple[str, ...] = ()
) -> Any:
    """Return a folder's model, frozen, on the meta device, where tensors have shapes and no values.

    Its class is that of the task ``wanted``, with a head for ``labels``; by default, that of the task that
    config.json names, or the body alone. Raises ``ConfigError`` if the model cannot be built.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    content = read_json(folder / "config.json", config)
    auto, architectures = "AutoModel", content.get("architectures")
    for task, table in TASKS.items():
        name = getattr(modeling_auto, table).get(str(content.get("model_type")))
        is_named = isinstance(architectures, list) and name is not None and name in architectures
        if task == wanted or (wanted is None and is_named):
            auto = AUTO[task]
    try:
        settings = make_settings(folder, config, labels)
        with torch.device("meta"):
            model = getattr(transformers, auto).from_config(settings, trust_remote_code=False)
        swap(model, locate(model, read_structures(folder, config), config))
        return model.requires_grad_(False)
    except ConfigError:
        raise
    except Exception as error:  # a contradictory config.json can make an architecture raise anything
        raise cannot_be_built(config, error) from error


def cannot_be_built(config: ModelConfig, error: Exception) -> ConfigError:
    """Return the error for a model whose architecture raised ``error``."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return ConfigError(
        f"model.path={config.path} cannot be built ({type(error).__name__}: {reason}). Check its config.json."
    )


def make_settings(folder: Path, config: ModelConfig, labels: tuple[str, ...]) -> Any:
    """Return transformers' configuration of the folder with ``model.config`` laid on.

    Raises ``ConfigError`` with every setting that does not fit.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = read_json(folder / "config.json", config)
    kind: Any = CONFIG_MAPPING[content["model_type"]]
    content = {key: value for key, value in content.items() if SET_ELSEWHERE.get(key) != "dataset"}
    aliases: Mapping[str, str] = getattr(kind, "attribute_map", {})
    given = {aliases.get(key, key): value for key, value in config.config.items()}
    known = {**kind.from_dict(dict(content)).to_dict(), **content}
    faults, laid = list[str](), _lay_on(known, given)
    options = [key for key in (*known, *aliases) if key not in SET_ELSEWHERE]
    for key, value in config.config.items():
        faults += _find_faults(f"model.config.{key}", aliases.get(key, key), value, known, options)
        if aliases.get(key, key) != key and aliases[key] in config.config:
            faults.append(f"model.config.{key} and model.config.{aliases[key]} are one setting; keep one.")
    if not faults:
        content |= {key: laid[key] for key in given}
        for key, number in list_depths(content):
            if number > MOST_LAYERS:
                faults.append(
                    f"model.path={config.path} with model.init=random: {key}={number:,} is more than "
                    f"{MOST_LAYERS:,}. Set model.config.{key} to a smaller number."
                )
    if faults:
        raise ConfigError(*faults)
    if labels:
        content["id2label"] = dict(enumerate(labels))
        content["label2id"] = {label: number for number, label in enumerate(labels)}
    return kind.from_dict(content)


def _lay_on(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``known`` with the ``given`` values; a mapping is laid on the mapping that it changes."""
    laid = dict(known)
    for key, value in given.items():
        old = known.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            laid[key] = _lay_on(old, value)
        else:
            laid[key] = value
    return laid


def _find_faults(
    name: str, key: str, value: Any, known: Mapping[str, Any], options: Iterable[str]
) -> list[str]:
    """Return why the setting ``name``, which is ``key`` beside the ``known`` ones, cannot be ``value``.

    ``options``: keys to suggest.
    """
    if key in SET_ELSEWHERE:
        return [f"{name} cannot be set: {SET_ELSEWHERE[key]} decides it."]
    if key.endswith("_implementation"):
        return [f"{name} cannot be set: it can name code that would be fetched and run."]
    if key.startswith("_") or key not in known:
        return [f"{name} is not a setting of this model.{suggest_nearest(key, options)}"]
    old, faults = known[key], list[str]()
    if isinstance(old, Mapping) and isinstance(value, Mapping):
        for inner, inner_value in value.items():
            faults += _find_faults(f"{name}.{inner}", inner, inner_value, old, old)
    elif not _has_type_of(old, value):
        faults.append(f"{name}={value!r} is of another type than the model's {old!r}.")
    return faults


def _has_type_of(old: Any, value: Any) -> bool:
    """Tell whether ``value`` may replace ``old``: of the same type, a whole number for a float, or null."""
    if old is None or value is None:
        return True
    return type(value) is type(old) or (isinstance(old, float) and type(value) is int)


def _check_memory(described: Any, config: ModelConfig) -> None:
    """Raise ``ConfigError`` unless the machine's memory could hold the weights of a model on meta."""
    needed = 0
    for tensor in (*described.parameters(), *described.buffers()):
        needed += tensor.numel()
    needed *= getattr(torch, config.dtype).itemsize
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise ConfigError(
            f"model.path={config.path} with model.init=random: the weights would take {needed:,} bytes, and "
            f"this machine has {present:,}. Set smaller sizes by model.config."
        )
