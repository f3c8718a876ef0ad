"""The processor that belongs to a model: of images (by PIL), or a tokenizer that can pad and knows the model's length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.settings import ModelConfig
from ..errors import ConfigError

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert"}  # their positions start after the padding index


def read_processor(folder: Path, config: ModelConfig, task: str, model: Any) -> tuple[Any, list[str]]:
    """The processor, and notes on what had to be assumed."""
    if task == "image_classification":
        return image_processor(folder, config, model)
    return tokenizer(folder, config, model), []


def image_processor(folder: Path, config: ModelConfig, model: Any) -> tuple[Any, list[str]]:
    """The folder's own image processor; without one, a plain resize to the model's size and pixels in [-1, 1]."""
    import transformers

    auto: Any = transformers.AutoImageProcessor
    if any((folder / name).is_file() for name in PROCESSORS):
        try:
            return auto.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            ), []
        except Exception as error:  # a file that contradicts itself raises whatever the processor happens to
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"model.path={config.path}: its image processor cannot be read ({reason}). Repair preprocessor_config.json."
            ) from error
    side = getattr(model.config, "image_size", None)
    if not isinstance(side, int):
        raise ConfigError(
            f"model.path={config.path} has no preprocessor_config.json, so its image size is unknown. Add that file."
        )
    processor = transformers.ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return processor, [
        f"The model has no preprocessor_config.json: images are resized to {side}x{side} and scaled to [-1, 1]."
    ]


def tokenizer(folder: Path, config: ModelConfig, model: Any) -> Any:
    """The folder's tokenizer with a padding token and a length that the model's positions allow; the model learns the padding token."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds, bare Exception among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = "Add tokenizer.json and tokenizer_config.json"
        raise ConfigError(
            f"model.path={config.path} has no tokenizer that can be read ({reason}). {cure}."
        ) from error
    if not found.is_fast or len(found) == 0:
        raise ConfigError(
            f"model.path={config.path} has no tokenizer.json, which is needed to count bytes. Save it again with a fast tokenizer."
        )
    if found.pad_token_id is None:
        if found.eos_token is None:
            raise ConfigError(
                f"model.path={config.path}: its tokenizer has neither a padding nor an end token. Set one in tokenizer_config.json."
            )
        found.pad_token = found.eos_token
    rows = model.get_input_embeddings().num_embeddings
    if len(found) > rows:
        cure = "They belong to different models: give the model its own tokenizer"
        raise ConfigError(
            f"model.path={config.path}: its tokenizer has {len(found)} tokens, but the model embeds {rows}. {cure}."
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = found.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        used = found.pad_token_id + 1 if model.config.model_type in OFFSET_POSITIONS else 0
        found.model_max_length = min(found.model_max_length, positions - used)
    return found
