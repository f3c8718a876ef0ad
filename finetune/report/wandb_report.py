"""Log a comparison to W&B as a run beside those of the sweep, with table, numbers and plots."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..system import safe
from .runs import NO_RESULT
from .schema import ComparisonData

INIT_SECONDS, FINISH_SECONDS = 20, 60
ROW_KEYS = (
    "rank",
    "mean",
    "low",
    "high",
    "sd",
    "finished",
    *NO_RESULT,
    "missing",
    "trained",
    "changed",
    "stored_bytes",
    "step_seconds",
    "train_seconds",
    "peak_memory_bytes",
    "trials",
)
VERSUS_KEYS = ("against", "difference", "p_holm", "verdict")
Say = Callable[[str], None]


def log_comparison(data: ComparisonData, folders: Sequence[Path], project: str, say: Say) -> None:
    """Log a comparison as a run in the group that is named after the sweep's folder.

    ``WANDB_MODE`` decides whether it is logged online; without it, a machine that is logged in to W&B logs
    online and any other offline. An error becomes one line to ``say``.
    """
    group = folders[0].resolve().name
    try:
        _log(data, folders[0].resolve(), project)
        say(f"W&B: logged to the project {project}, group {group}.")
    except Exception as error:  # a failing logger must not lose the comparison
        reason = (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0][:200]
        say(f"Warning: W&B failed ({reason}); everything else is done.")


def _log(data: ComparisonData, folder: Path, project: str) -> None:
    import wandb

    wandb.setup(wandb.Settings(silent=True, host=""))
    mode: Any = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    settings = wandb.Settings(
        silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, **safe.PRIVATE
    )
    run = wandb.init(
        mode=mode,
        project=project,
        group=folder.name,
        job_type="comparison",
        name=f"comparison of {folder.name}",
        dir=str(folder.absolute()),
        config={key: data[key] for key in ("metric", "task", "by", "baseline")},
        settings=settings,
    )
    try:
        columns, rows = make_table(data)
        run.log({"comparison": wandb.Table(columns=columns, data=rows), **_make_images(data)}, step=0)
        run.summary.update(make_summary(data))
    finally:
        run.finish()


def make_table(data: ComparisonData) -> tuple[list[Any], list[list[Any]]]:
    """Return the names of the columns, and a list of plain values for each row."""
    columns: list[Any] = ["row", *data["by"], *ROW_KEYS, *VERSUS_KEYS, "command"]
    rows = []
    for row in data["rows"]:
        cells = [row["label"]]
        for key in data["by"]:
            value = row["by"][key]
            cells.append(None if value is None else str(value))
        for key in ROW_KEYS:
            cells.append(row[key])
        for key in VERSUS_KEYS:
            cells.append((row["versus"] or {}).get(key))
        cells.append(row["command"])
        rows.append(cells)
    return columns, rows


def make_summary(data: ComparisonData) -> dict[str, Any]:
    """Return the numbers of each row under names such as ``lora/mean``, and the fairness check."""
    found: dict[str, Any] = {}
    for row in data["rows"]:
        for key in ROW_KEYS:
            if row[key] is not None:
                found[f"{row['label']}/{key}"] = row[key]
    found["fairness"] = [finding["words"] for finding in data["fairness"]]
    return found


def _make_images(data: ComparisonData) -> dict[str, Any]:
    """Return the plots as images in memory, since their files are temporary."""
    import wandb
    from PIL import Image

    from .plots import write_plots

    images = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in write_plots(data, Path(folder), kinds=("png",)):
            with Image.open(file) as image:
                images[f"plots/{file.stem}"] = wandb.Image(image.convert("RGB"))
    return images
