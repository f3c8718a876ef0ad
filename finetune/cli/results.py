"""The commands that read results: ``compare`` and ``reproduce``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
UNFAIR = 3  # exit code of compare --strict with findings
SUFFIXES = (".csv", ".md", ".tex", ".json", ".html")
OURS = {
    "result.json",
    "tuning.json",
    "failure.json",
    "compose.json",
    "search.json",
    "sweep.json",
    "delta.json",
    "state.json",
    "manifest.json",
}


def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of sweeps or of runs.", show_default=False)
    ],
    by: Annotated[
        list[str] | None,
        typer.Option(help="The settings that make rows: method,sparsity. By default, all that differ."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Another number than test.accuracy or test.bits_per_byte: val.loss, retention.accuracy."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The row to test the others against; by default, the best.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if rows differ in more than what is compared.")
    ] = False,
    out: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also write FILE.csv, .md, .tex, .json or .html."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write plots as PNG and PDF.")
    ] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also log the table and plots to W&B.")] = False,
    project: Annotated[str, typer.Option(help="The project in W&B.")] = "finetune",
    as_json: AsJson = False,
) -> None:
    """Compare runs: means, intervals over seeds, paired tests, and whether the comparison is fair."""
    from ..report.comparison import compare as find
    from ..storage.run_folder import plain

    files = out or []
    _check_files(files)
    found = find(
        folders,
        [word.strip() for text in by or [] for word in text.split(",") if word.strip()],
        metric,
        baseline,
    )
    drawn = wandb or plots is not None or any(file.suffix == ".html" for file in files)
    data = plain(
        found.as_dict(
            curves=drawn or as_json or any(file.suffix == ".json" for file in files),
            defaults=_defaults if drawn else None,
        )
    )
    for written in _write(data, files, plots):
        print(f"Written: {written}", file=sys.stderr)
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        from rich.console import Console

        from ..report.formats import terminal

        console = Console()
        for part in terminal(data, console.width):
            console.print(part)
    if wandb:
        from ..report.wandb_report import log

        log(data, folders, project, lambda line: print(line, file=sys.stderr))
    raise typer.Exit(UNFAIR if strict and data["fairness"] else 0)


@cache
def _known(choices: tuple[str, ...]) -> Mapping[str, Any]:
    from ..config.load import tree

    return {key: value for key, (value, _) in tree(list(choices)).items()}


def _defaults(choices: Sequence[str]) -> Mapping[str, Any]:
    """Every setting as it is where only parts are chosen."""
    return _known(tuple(choices))


def _check_files(files: Sequence[Path]) -> None:
    """Raises ``ConfigError`` for every file that cannot or must not be written."""
    faults = []
    for file in files:
        if file.suffix not in SUFFIXES:
            faults.append(f"--out {file}: its end must say the format, one of {', '.join(SUFFIXES)}.")
        elif file.is_dir():
            faults.append(f"--out {file} is a folder. Give a file in it, such as {file / 'table.csv'}.")
        elif file.name in OURS or (file.is_file() and not _ours(file)):
            faults.append(
                f"--out {file} holds something else than an earlier comparison. Give another name, or remove it."
            )
    if faults:
        raise ConfigError(*faults)


MARKS = {
    ".csv": "row,",
    ".md": "<!-- finetune compare",
    ".tex": "% finetune compare",
    ".json": '{\n  "format"',
    ".html": "<!doctype html",
}


def _ours(file: Path) -> bool:
    """Whether an earlier comparison wrote ``file``, which may then be replaced."""
    with file.open(encoding="utf-8", errors="replace") as text:
        start = text.read(4000)
    return (
        start.lower().startswith(MARKS[file.suffix]) and (file.suffix != ".html" or "finetune" in start)
    ) or not start


def _write(data: dict[str, Any], files: Sequence[Path], folder: Path | None) -> list[Path]:
    """Write every file that was asked for; returns them."""
    from ..report import formats
    from ..storage.run_folder import replacing, write_json_atomic

    texts: dict[str, Callable[[dict[str, Any]], str]] = {
        ".csv": formats.csv,
        ".md": formats.markdown,
        ".tex": formats.latex,
    }
    heads = {".md": "<!-- finetune compare -->\n", ".tex": "% finetune compare\n", ".csv": ""}
    made = []
    try:
        for file in files:
            if file.suffix == ".json":
                write_json_atomic(file, data)
            elif file.suffix == ".html":
                from ..report import html

                html.write(data, file)
            else:
                with replacing(file) as temporary:
                    temporary.write_text(heads[file.suffix] + texts[file.suffix](data), encoding="utf-8")
            made.append(file)
        if folder is not None:
            from ..report import plots

            made += plots.write(data, folder)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or file} cannot be written: {error.strerror}. Give a place that you may write to."
        ) from error
    return made


def reproduce(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)
    ],
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the repetition there; by default it is removed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a finished run again, and say whether the result is identical, inside the interval of its seeds, or neither (exit 1)."""
    from ..artifacts.reproduce import reproduce as again
    from ..storage.run_folder import plain

    found = again(run, keep)
    if as_json:
        print(json.dumps(plain(found), indent=2, allow_nan=False))
    else:
        print(found["words"])
        for name, (before, now) in found["differs"].items():
            print(f"  {name}: {before} before, {now} now")
        if found["kept"]:
            print(f"  kept in {found['kept']}")
    raise typer.Exit(1 if found["verdict"] == "different" else 0)
