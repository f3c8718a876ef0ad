"""Read and write plain Hugging Face folders. A folder is written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.settings import ModelConfig
from ..errors import ConfigError
from ..models.folder import check_fits
from ..models.load import quiet, read_pretrained
from ..storage.atomic import replacing
from ..system.disk import safetensors_errors_as_os_errors


def check_free(out: Path) -> None:
    """Raise ``ConfigError`` unless ``out`` can become a new folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not empty. Choose a new folder.")


@contextmanager
def writing_folder(out: Path) -> Iterator[Path]:
    """Give a temporary path that is renamed to ``out`` if the block ends without an error.

    Raises ``ConfigError`` if it cannot be written.
    """
    try:
        with replacing(out) as temporary, safetensors_errors_as_os_errors(out):
            yield temporary
    except OSError as error:
        raise ConfigError(
            f"out={out} cannot be written: {error.strerror or error}. "
            "Choose a folder where you may write and where there is free space."
        ) from error


def read(folder: Path, task: str, dtype: Any) -> Any:
    """Read the whole model of a folder that ``finetune merge`` wrote, frozen and in eval mode.

    Raises ``ConfigError`` if weights are missing, damaged or of another shape.
    """
    config = ModelConfig("merged", str(folder), dtype=dtype)
    check_fits(folder, config, task)
    try:
        with quiet():
            model, info = read_pretrained(folder, config, task, {})
    except ConfigError:
        raise
    except Exception as error:  # the architecture's code raises any type for a contradictory config.json
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{folder} holds no model that can be built ({type(error).__name__}: {reason}). Merge again."
        ) from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ConfigError(
            f"{folder} does not hold the whole model: {len(wrong)} weights are missing or of another shape "
            f"(first: {wrong[0]})."
        )
    return model.eval().requires_grad_(False)
