"""Read the processor that belongs to a model: an image processor, or a tokenizer that can pad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.settings import ModelConfig
from ..errors import ConfigError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Model types whose positions start after the padding index, so that fewer tokens than positions are allowed.
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert"}


def read_processor(folder: Path, config: ModelConfig, task: str, model: Any) -> tuple[Any, list[str]]:
    """Return the processor for the task, and notes about assumptions."""
    if task == "image_classification":
        return read_image_processor(folder, config, model)
    return read_tokenizer(folder, config, model), []


def read_image_processor(folder: Path, config: ModelConfig, model: Any) -> tuple[Any, list[str]]:
    """Return the folder's own image processor, and notes.

    If there is none, images are resized to the model's size and scaled to [-1, 1].
    """
    import transformers

    auto: Any = transformers.AutoImageProcessor
    if any((folder / name).is_file() for name in PROCESSOR_FILES):
        try:
            found = auto.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a damaged file can cause any kind of error
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"model.path={config.path}: its image processor cannot be read ({reason}). "
                "Repair preprocessor_config.json."
            ) from error
        return found, []
    side = getattr(model.config, "image_size", None)
    if not isinstance(side, int):
        raise ConfigError(
            f"model.path={config.path} has no preprocessor_config.json, so its image size is unknown. "
            "Add that file."
        )
    processor = transformers.ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    note = (
        f"The model has no preprocessor_config.json: images are resized to {side}x{side} "
        "and scaled to [-1, 1]."
    )
    return processor, [note]


def read_tokenizer(folder: Path, config: ModelConfig, model: Any) -> Any:
    """Return the folder's tokenizer, with a padding token and a length that the model's positions allow.

    Sets the model's padding token, too. Raises ``ConfigError`` if the tokenizer is missing, slow, cannot pad,
    or belongs to another model.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds, even plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.path={config.path} has no tokenizer that can be read ({reason}). "
            "Add tokenizer.json and tokenizer_config.json."
        ) from error
    if not found.is_fast or len(found) == 0:
        raise ConfigError(
            f"model.path={config.path} has no tokenizer.json, which is needed to count bytes. "
            "Save it again with a fast tokenizer."
        )
    if found.pad_token_id is None:
        if found.eos_token is None:
            raise ConfigError(
                f"model.path={config.path}: its tokenizer has neither a padding nor an end token. "
                "Set one in tokenizer_config.json."
            )
        found.pad_token = found.eos_token
    embedded = model.get_input_embeddings().num_embeddings
    if len(found) > embedded:
        raise ConfigError(
            f"model.path={config.path}: its tokenizer has {len(found)} tokens, "
            f"but the model embeds {embedded}. "
            "They belong to different models: give the model its own tokenizer."
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = found.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        if model.config.model_type in OFFSET_POSITIONS:
            positions -= found.pad_token_id + 1
        found.model_max_length = min(found.model_max_length, positions)
    return found
