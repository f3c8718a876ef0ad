"""A comparison in W&B: one run beside those of the sweep, with the table, the numbers of each row and the plots."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system import safe
from .runs import LOST

INIT_SECONDS, FINISH_SECONDS = 20, 60
KEYS = (
    "rank", "mean", "low", "high", "sd", "finished", *LOST, "missing", "trained", "stored_bytes", "step_seconds", "train_seconds",
    "peak_memory_bytes", "trials",
)  # fmt: skip
Say = Callable[[str], None]


def log(data: Mapping[str, Any], folders: Sequence[Path], project: str, say: Say) -> None:
    """Log ``data`` (``Comparison.as_dict()``) as a run of the group that the sweep's folder names.

    Online if this machine is logged in, else offline, as ``WANDB_MODE`` says if it is set. Whatever goes wrong is one line to ``say``.
    """
    try:
        _log(data, folders[0].resolve(), project)
        say(f"W&B: logged to the project {project}, group {folders[0].resolve().name}.")
    except Exception as error:  # no fault of a logger is worth a comparison
        words = (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0][:200]
        say(f"Warning: W&B failed ({words}); everything else is done.")


def _log(data: Mapping[str, Any], folder: Path, project: str) -> None:
    import wandb

    wandb.setup(wandb.Settings(silent=True, host=""))
    mode: Any = os.environ.get("WANDB_MODE") or (
        "online" if wandb.login(prompt=False, verify=False) else "offline"
    )
    settings = wandb.Settings(
        silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, **safe.PRIVATE
    )
    about = {key: data[key] for key in ("metric", "task", "by", "baseline")}
    run = wandb.init(
        mode=mode, project=project, group=folder.name, job_type="comparison", name=f"comparison of {folder.name}", dir=str(folder.absolute()),
        config=about,
        settings=settings,
    )  # fmt: skip
    try:
        columns, rows = table(data)
        run.log({"comparison": wandb.Table(columns=columns, data=rows), **_plots(data)}, step=0)
        run.summary.update(numbers(data))
    finally:
        run.finish()


def table(data: Mapping[str, Any]) -> tuple[list[Any], list[list[Any]]]:
    """Column names and one list of plain values a row."""
    tests = ("against", "difference", "p_holm", "verdict")
    columns: list[Any] = ["row", *data["by"], *KEYS, *tests, "command"]
    rows = []
    for row in data["rows"]:
        fields = [None if row["by"][key] is None else str(row["by"][key]) for key in data["by"]]
        versus = row["versus"] or {}
        rows.append(
            [
                row["label"],
                *fields,
                *(row[key] for key in KEYS),
                *(versus.get(key) for key in tests),
                row["command"],
            ]
        )
    return columns, rows


def numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """One summary value a number, as ``lora/mean``, and the findings of the fairness check."""
    found = {
        f"{row['label']}/{key}": row[key] for row in data["rows"] for key in KEYS if row[key] is not None
    }
    return {**found, "fairness": [finding["words"] for finding in data["fairness"]]}


def _plots(data: Mapping[str, Any]) -> dict[str, Any]:
    """The plots as images, read into W&B's own files before theirs are gone."""
    import wandb

    from . import plots

    with tempfile.TemporaryDirectory() as folder:
        made = plots.write(dict(data), Path(folder), kinds=("png",))
        return {f"plots/{file.stem}": wandb.Image(_pixels(file)) for file in made}


def _pixels(file: Path) -> Any:
    from PIL import Image

    with Image.open(file) as image:
        return image.convert("RGB")
