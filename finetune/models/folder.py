"""Where a pretrained model lies, and what can be wrong with it before any weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import ModelConfig

BUILTIN = Path(__file__).parent
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
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
            raise ConfigError(f"model.revision={config.revision} means nothing for model.path={config.path}, which is not on the hub. Remove it.")
        return (folder, config.path) if folder.is_dir() else (_builtin(config.path), config.path)
    if folder.exists():
        raise ConfigError(f"model.path={config.path} is a file. Give the folder that holds config.json and model.safetensors.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.path):
        raise ConfigError(f"model.path={config.path}: there is no such folder. Give a folder, a hub id, or builtin:tiny_vit.")
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
        found = snapshot_download(config.path, revision=config.revision, allow_patterns=WANTED, local_files_only=not config.download)
    except Exception as error:
        if config.download:
            reason = type(error).__name__
            raise ConfigError(f"model.path={config.path} could not be fetched from the hub ({reason}). Check the id and the network.") from error
        cure = "Check the path, or set model.download=true to fetch it"
        raise ConfigError(f"model.path={config.path} is neither a folder here nor in the local hub cache. {cure}.") from error
    return Path(found), f"{config.path}@{Path(found).name}"


def check_fits(folder: Path, config: ModelConfig, task: str) -> None:
    """Raise ``ConfigError`` unless the folder's model type can do the task."""
    from transformers.models.auto import modeling_auto

    settings = read_json(folder / "config.json", config)
    kind = str(settings.get("model_type"))
    known = {t: getattr(modeling_auto, names) for t, names in TASKS.items()}
    fits = [t for t in TASKS if kind in known[t]]
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not settings.get("is_decoder"):
        fits = [t for t in fits if t != "causal_lm"]  # bidirectional attention would see the token it must predict
    if task not in fits:
        able = f"It can do {' and '.join(fits)}" if fits else "It can do none of the tasks here"
        cure = "choose another model or dataset"
        raise ConfigError(f"model.path={config.path} is a {kind}, which does not fit the data set's task {task}. {able}: {cure}.")


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Raise ``ConfigError`` naming every weight file that is missing, cut short or a pickle."""
    from safetensors import SafetensorError, safe_open

    faults = []
    for file in weight_files(folder, config):
        if not file.is_file():
            faults.append(_absent(folder, file, config))
            continue
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            faults.append(f"model.path={config.path}: {file.name} is damaged or cut short ({error}). Copy or download it again.")
    if faults:
        raise ConfigError(*faults)


def weight_files(folder: Path, config: ModelConfig) -> list[Path]:
    """The safetensors files that hold the model, there or not."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index, config)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
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
        raise ConfigError(f"model.path={config.path} has no {file.name}. Give a folder written by transformers' save_pretrained.")
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.path={config.path}: {file.name} is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model.path={config.path}: {file.name} holds no JSON object. Copy or download it again.")
    return content
