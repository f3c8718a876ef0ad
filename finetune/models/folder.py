"""Find a pretrained model's folder, and check it before any weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..config.settings import ModelConfig
from ..errors import ConfigError
from ..system import safe

BUILTIN = Path(__file__).parent
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
FEW_LAYERS = 64  # config.json may claim up to this many layers without a check against the weights
AUTO = {
    "image_classification": "AutoModelForImageClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}  # the task: the class of transformers that finds a model's class for it
TASKS = {
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}  # the task: transformers' table of the model types that can do it


def find_folder(config: ModelConfig) -> tuple[Path, str]:
    """Return the local folder of a model, and its source: the path, or the hub id with its commit."""
    folder = Path(config.path).expanduser()
    if config.path.startswith("builtin:") or folder.is_dir():
        if config.revision is not None:
            raise ConfigError(
                f"model.revision={config.revision} has no effect with model.path={config.path}, "
                "which is not on the hub. Remove it."
            )
        if not folder.is_dir():
            folder = _find_builtin(config.path)
        if (folder / "config.yaml").is_file() and not (folder / "config.json").exists():
            raise ConfigError(
                f"model.path={config.path} is a run, not a model. Write its model with "
                f"`finetune merge ckpt={config.path} out=FOLDER`, and name that folder."
            )
        return folder, config.path
    if folder.exists():
        raise ConfigError(
            f"model.path={config.path} is a file. "
            "Give the folder that holds config.json and model.safetensors."
        )
    if not HUB_ID.fullmatch(config.path):
        raise ConfigError(
            f"model.path={config.path}: there is no such folder. "
            "Give a folder, a hub id, or builtin:tiny_vit."
        )
    return _find_on_hub(config)


def _find_builtin(path: str) -> Path:
    folder = BUILTIN / path.removeprefix("builtin:")
    if not (folder / "config.json").is_file() or folder == BUILTIN:
        known = [f"builtin:{file.parent.name}" for file in sorted(BUILTIN.glob("*/config.json"))]
        raise ConfigError(f"model.path={path} is not built in. Known: {', '.join(known) or 'none'}.")
    return folder


def _find_on_hub(config: ModelConfig) -> tuple[Path, str]:
    """Return a snapshot in the hub's cache; it is downloaded first if the configuration allows that."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        found = snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=DOWNLOADED,
            local_files_only=not config.download,
        )
    except Exception as error:
        fault = (
            f"model.path={config.path} is neither a folder here nor in the local hub cache. "
            "Check the path, or set model.download=true to fetch it."
        )
        if config.download:
            fault = (
                f"model.path={config.path} could not be fetched from the hub ({type(error).__name__}). "
                "Check the id and the network."
            )
        raise ConfigError(fault) from error
    return Path(found), f"{config.path}@{Path(found).name}"


def check_fits(folder: Path, config: ModelConfig, task: str) -> None:
    """Raise ``ConfigError`` unless the folder's model type can do the task and needs no code of its own."""
    from transformers.models.auto import modeling_auto

    settings = read_json(folder / "config.json", config)
    model_type = str(settings.get("model_type"))
    fitting = refuse_foreign_code(folder, config)
    is_bidirectional = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_bidirectional and not settings.get("is_decoder") and "causal_lm" in fitting:
        fitting.remove("causal_lm")  # its attention would see the token that it must predict
    if task not in fitting:
        able = f"It can do {' and '.join(fitting)}" if fitting else "It can do none of the tasks here"
        raise ConfigError(
            f"model.path={config.path} is a {model_type}, which does not fit the data set's task {task}. "
            f"{able}: choose another model or dataset."
        )


def refuse_foreign_code(folder: Path, config: ModelConfig) -> list[str]:
    """Return the tasks that the folder's model type can do.

    Raises ``ConfigError`` for everything in the folder that would run code or read weights from elsewhere.
    """
    from transformers.models.auto import modeling_auto

    settings = read_json(folder / "config.json", config)
    fitting = []
    for task, table in TASKS.items():
        if str(settings.get("model_type")) in getattr(modeling_auto, table):
            fitting.append(task)
    if faults := _find_foreign_code(folder, config, settings, is_known=bool(fitting)):
        raise ConfigError(*faults)
    return fitting


def _find_foreign_code(
    folder: Path, config: ModelConfig, settings: Mapping[str, Any], is_known: bool
) -> list[str]:
    """Return a fault for everything in the folder that would run code or read weights from elsewhere.

    ``is_known``: transformers has an implementation of the model type.
    """
    named = f"model.path={config.path}"
    faults = []
    if settings.get("auto_map") and not is_known:
        faults.append(
            f"{named} needs Python code of its own (auto_map in its config.json), and such code is never run "
            "here; choose a model that the installed transformers knows."
        )
    for key, value in _list_settings(settings):
        if key.strip("_").endswith("_implementation") and "/" in str(value):
            faults.append(
                f"{named}: its config.json asks for {key}={value!r}, a kernel that would be fetched and run. "
                "Remove that line."
            )
    if settings.get("quantization_config"):
        faults.append(
            f"{named} is quantized (quantization_config in its config.json), which is not supported. "
            "Choose its unquantized form."
        )
    if (folder / "adapter_config.json").exists():
        faults.append(
            f"{named} holds a peft adapter (adapter_config.json), which may name a base of its own. "
            "Merge it first, or remove its files."
        )
    return faults


def check_weights(folder: Path, config: ModelConfig) -> int:
    """Return how many entries the weights have.

    Raises ``ConfigError`` that names every file that is missing, truncated or a pickle. If there is no such
    file, it names each number of layers in config.json that the weights cannot have.
    """
    faults, sizes = [], list[int]()
    for file in list_weight_files(folder, config):
        if not file.is_file():
            faults.append(_explain_absent(folder, file, config))
            continue
        try:
            for _, shape in safe.read_tensor_header(file).values():
                sizes.append(prod(shape))
        except (OSError, ValueError) as error:
            faults.append(
                f"model.path={config.path}: {file.name} is damaged or cut short ({error}). "
                "Copy or download it again."
            )
    if not faults:
        faults = _find_absurd_depths(read_json(folder / "config.json", config), len(sizes), config)
    if faults:
        raise ConfigError(*faults)
    return sum(sizes)


def _find_absurd_depths(settings: Mapping[str, Any], tensors: int, config: ModelConfig) -> list[str]:
    """Return a fault for each number of layers that exceeds the number of tensors.

    Every layer has a tensor, and building so many layers would take hours.
    """
    faults = []
    for key, number in list_depths(settings):
        if number > max(FEW_LAYERS, tensors):
            faults.append(
                f"model.path={config.path}: its config.json says {key}={number:,}, and its weights are "
                f"{tensors:,} tensors. Choose a checkpoint that is complete."
            )
    return faults


def list_depths(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each number of layers, or of experts, in config.json by its key."""
    for key, value in _list_settings(settings):
        if not any(word in key for word in ("layer", "depth", "expert")):
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                yield key, number


def _list_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of config.json, and those of its parts, such as ``text_config``."""
    yield from settings.items()
    for key, value in settings.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from value.items()


def list_weight_files(folder: Path, config: ModelConfig) -> list[Path]:
    """Return the safetensors files that should hold the model; they may be missing.

    Raises ``ConfigError`` if the index of a sharded checkpoint is damaged or names other files.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    content = read_json(index, config)
    fault = safe.find_mismatch(content, {"weight_map": {str: str}})
    if fault:
        raise ConfigError(_explain_index(index, fault, config))
    names = sorted(set(content["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            fault = f"it names {name!r}, which is not a safetensors file of this folder"
            raise ConfigError(_explain_index(index, fault, config))
    return [folder / name for name in names]


def _explain_index(index: Path, fault: str, config: ModelConfig) -> str:
    return (
        f"model.path={config.path}: {index.name} cannot be used ({fault}). "
        "Save the model again with save_pretrained."
    )


def _explain_absent(folder: Path, file: Path, config: ModelConfig) -> str:
    """Return the fault of a missing weight file, which says whether there is a pickle instead."""
    pickles: list[str] = []
    for pattern in PICKLES:
        pickles += [pickle.name for pickle in folder.glob(pattern)]
    if pickles:
        return (
            f"model.path={config.path} has its weights only as a pickle ({min(pickles)}), which can run "
            "code when read. Save the model again with save_pretrained, which writes safetensors."
        )
    return f"{_explain_missing_file(file, config)[:-1]}, or draw the weights: model.init=random."


def _explain_missing_file(file: Path, config: ModelConfig) -> str:
    return (
        f"model.path={config.path} has no {file.name}. "
        "Give a folder that transformers' save_pretrained wrote."
    )


def read_json(file: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the object in a JSON file of the model's folder; ``Infinity`` is allowed, as models write it."""
    if not file.is_file():
        raise ConfigError(_explain_missing_file(file, config))
    try:
        content = json.loads(safe.read(file, safe.JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"model.path={config.path}: {file.name} is not valid JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"model.path={config.path}: {file.name} does not hold a JSON object. Copy or download it again."
        )
    return content
