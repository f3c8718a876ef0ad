"""Where a pretrained model lies, and what can be wrong with it before any weight is read."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

from ..config.settings import ModelConfig
from ..errors import ConfigError
from ..system import safe

BUILTIN = Path(__file__).parent
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
TASKS = {
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}


def find(config: ModelConfig) -> tuple[Path, str]:
    """The local folder of a model, and its source as told to users: the path, or a hub id with its commit."""
    folder = Path(config.path).expanduser()
    if config.path.startswith("builtin:") or folder.is_dir():
        if config.revision is not None:
            raise ConfigError(
                f"model.revision={config.revision} means nothing for model.path={config.path}, which is not on the hub. Remove it."
            )
        return (folder, config.path) if folder.is_dir() else (_builtin(config.path), config.path)
    if folder.exists():
        raise ConfigError(
            f"model.path={config.path} is a file. Give the folder that holds config.json and model.safetensors."
        )
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.path):
        raise ConfigError(
            f"model.path={config.path}: there is no such folder. Give a folder, a hub id, or builtin:tiny_vit."
        )
    return _hub(config)


def _builtin(path: str) -> Path:
    folder = BUILTIN / path.removeprefix("builtin:")
    if not (folder / "config.json").is_file() or folder == BUILTIN:
        known = ", ".join(f"builtin:{p.parent.name}" for p in sorted(BUILTIN.glob("*/config.json")))
        raise ConfigError(f"model.path={path} is not built in. Known: {known or 'none'}.")
    return folder


def _hub(config: ModelConfig) -> tuple[Path, str]:
    """A snapshot in the hub's cache, fetched first if the config allows it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        found = snapshot_download(
            config.path, revision=config.revision, allow_patterns=WANTED, local_files_only=not config.download
        )
    except Exception as error:
        if config.download:
            reason = type(error).__name__
            raise ConfigError(
                f"model.path={config.path} could not be fetched from the hub ({reason}). Check the id and the network."
            ) from error
        cure = "Check the path, or set model.download=true to fetch it"
        raise ConfigError(
            f"model.path={config.path} is neither a folder here nor in the local hub cache. {cure}."
        ) from error
    return Path(found), f"{config.path}@{Path(found).name}"


def check_fits(folder: Path, config: ModelConfig, task: str) -> None:
    """Raise ``ConfigError`` unless the folder's model type can do the task."""
    from transformers.models.auto import modeling_auto

    settings = read_json(folder / "config.json", config)
    kind = str(settings.get("model_type"))
    known = {t: getattr(modeling_auto, names) for t, names in TASKS.items()}
    if faults := _code(folder, config, settings, known):
        raise ConfigError(*faults)
    fits = [t for t in TASKS if kind in known[t]]
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not settings.get("is_decoder"):
        fits = [
            t for t in fits if t != "causal_lm"
        ]  # bidirectional attention would see the token it must predict
    if task not in fits:
        able = f"It can do {' and '.join(fits)}" if fits else "It can do none of the tasks here"
        cure = "choose another model or dataset"
        raise ConfigError(
            f"model.path={config.path} is a {kind}, which does not fit the data set's task {task}. {able}: {cure}."
        )


def _code(folder: Path, config: ModelConfig, settings: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """What a model's folder asks to be run or read from elsewhere."""
    named, faults = f"model.path={config.path}", []
    if settings.get("auto_map") and not any(
        str(settings.get("model_type")) in names for names in known.values()
    ):
        cure = "choose a model that the installed transformers knows"
        faults.append(
            f"{named} needs Python code of its own (auto_map in its config.json), and such code is never run here; {cure}."
        )
    for key, value in (
        (k, v)
        for part in (settings, *_inner(settings))
        for k, v in part.items()
        if k.strip("_").endswith("_implementation")
    ):
        if "/" in str(value):
            faults.append(
                f"{named}: its config.json asks for {key}={value!r}, a kernel that would be fetched and run. Remove that line."
            )
    if settings.get("quantization_config"):
        faults.append(
            f"{named} is quantized (quantization_config in its config.json), which is not supported. Choose its unquantized form."
        )
    if (folder / "adapter_config.json").exists():
        cure = "Merge it first, or remove its files"
        faults.append(
            f"{named} holds a peft adapter (adapter_config.json), which may name a base of its own. {cure}."
        )
    return faults


def check_weights(folder: Path, config: ModelConfig) -> int:
    """How many entries the weights have. Raises ``ConfigError`` naming every file that is missing, cut short or a pickle, and impossible depths."""
    faults, sizes = [], list[int]()
    for file in weight_files(folder, config):
        if not file.is_file():
            faults.append(_absent(folder, file, config))
            continue
        try:
            sizes += [prod(shape) for _, shape in safe.tensors_of(file).values()]
        except (OSError, ValueError) as error:
            faults.append(
                f"model.path={config.path}: {file.name} is damaged or cut short ({error}). Copy or download it again."
            )
    faults = faults or _too_deep(read_json(folder / "config.json", config), len(sizes), config)
    if faults:
        raise ConfigError(*faults)
    return sum(sizes)


def _too_deep(settings: dict[str, Any], tensors: int, config: ModelConfig) -> list[str]:
    """Numbers of layers that cannot be, since each layer has a tensor; to build them would take hours."""
    given = [(key, value) for part in (settings, *_inner(settings)) for key, value in part.items()]
    pairs = ((key, n) for key, value in given for n in (value if isinstance(value, list) else [value]))
    return [
        f"model.path={config.path}: its config.json says {key}={n:,}, and its weights are {tensors:,} tensors. Choose a checkpoint that is complete."
        for key, n in pairs
        if ("layer" in key or "depth" in key) and isinstance(n, int | float) and n > max(64, tensors)
    ]


def _inner(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for key, value in settings.items() if key.endswith("_config") and isinstance(value, dict)]


def weight_files(folder: Path, config: ModelConfig) -> list[Path]:
    """The safetensors files that hold the model, there or not."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    content = read_json(index, config)
    fault = safe.differs(content, {"weight_map": {str: str}})
    names = [] if fault else sorted(set(content["weight_map"].values()))
    wrong = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if fault or wrong:
        what = fault or f"it names {wrong[0]!r}, which is no safetensors file of this folder"
        raise ConfigError(
            f"model.path={config.path}: {index.name} cannot be used ({what}). Save the model again with save_pretrained."
        )
    return [folder / name for name in names]


def _absent(folder: Path, file: Path, config: ModelConfig) -> str:
    pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickled:
        cure = "Save the model again with save_pretrained, which writes safetensors"
        return f"model.path={config.path} has its weights only as a pickle ({pickled[0]}), which can run code when read. {cure}."
    return f"model.path={config.path} has no {file.name}. Give a folder written by save_pretrained."


def read_json(file: Path, config: ModelConfig) -> dict[str, Any]:
    """The object in a JSON file of the model's folder."""
    if not file.is_file():
        raise ConfigError(
            f"model.path={config.path} has no {file.name}. Give a folder written by transformers' save_pretrained."
        )
    try:
        content = json.loads(safe.read(file, safe.JSON_BYTES))  # models write Infinity, too
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"model.path={config.path}: {file.name} is not valid JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"model.path={config.path}: {file.name} holds no JSON object. Copy or download it again."
        )
    return content
