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
from .options import Plugins, load_plugins

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
UNFAIR = 3  # exit code of compare --strict if the fairness check finds anything
SUFFIXES = (".csv", ".md", ".tex", ".json", ".html")
RUN_FILES = {
    "result.json",
    "tuning.json",
    "failure.json",
    "compose.json",
    "search.json",
    "sweep.json",
    "delta.json",
    "state.json",
    "manifest.json",
}  # names of files that other commands write; --out never replaces one
STARTS = {
    ".csv": "row,",
    ".md": "<!-- finetune compare",
    ".tex": "% finetune compare",
    ".json": '{\n  "format"',
    ".html": "<!doctype html",
}  # how a file of an earlier comparison begins


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
            help="The number to compare, such as val.loss; by default test.accuracy or test.bits_per_byte."
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
    from ..report.comparison import compare as compare_runs
    from ..storage.atomic import to_json_value

    files = out or []
    _check_files(files)
    comparison = compare_runs(folders, _split_words(by or []), metric, baseline)
    suffixes = {file.suffix for file in files}
    draws = wandb or plots is not None or ".html" in suffixes
    curves = draws or as_json or ".json" in suffixes
    data = to_json_value(comparison.as_dict(curves=curves, defaults=_load_defaults if draws else None))
    for written in _write_files(data, files, plots):
        print(f"Written: {written}", file=sys.stderr)
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        _print_table(data)
    if wandb:
        from ..report.wandb_report import log_comparison

        log_comparison(data, folders, project, lambda line: print(line, file=sys.stderr))
    raise typer.Exit(UNFAIR if strict and data["fairness"] else 0)


def _split_words(texts: Sequence[str]) -> list[str]:
    """Return the words of texts such as ``method,sparsity``."""
    words = []
    for text in texts:
        words += [word.strip() for word in text.split(",") if word.strip()]
    return words


def _print_table(data: dict[str, Any]) -> None:
    from rich.console import Console

    from ..report.formats import show_in_terminal

    console = Console()
    for part in show_in_terminal(data, console.width):
        console.print(part)


def _load_defaults(choices: Sequence[str]) -> Mapping[str, Any]:
    """Return all settings of the configuration that ``choices`` alone select."""
    return _load_settings(tuple(choices))


@cache
def _load_settings(choices: tuple[str, ...]) -> Mapping[str, Any]:
    from ..config.load import tree

    return {key: value for key, (value, _) in tree(list(choices)).items()}


def _check_files(files: Sequence[Path]) -> None:
    """Raise ``ConfigError`` for every file that cannot or must not be written."""
    faults = []
    for file in files:
        if file.suffix not in SUFFIXES:
            faults.append(f"--out {file}: the suffix must name the format, one of {', '.join(SUFFIXES)}.")
        elif file.is_dir():
            faults.append(f"--out {file} is a folder. Give a file in it, such as {file / 'table.csv'}.")
        elif file.name in RUN_FILES or (file.is_file() and not _is_replaceable(file)):
            faults.append(
                f"--out {file} was not written by an earlier comparison and is not replaced. "
                "Give another name, or remove the file."
            )
    if faults:
        raise ConfigError(*faults)


def _is_replaceable(file: Path) -> bool:
    """Tell whether ``file`` is empty or was written by an earlier comparison."""
    with file.open(encoding="utf-8", errors="replace") as text:
        start = text.read(4000)
    if not start:
        return True
    if file.suffix == ".html" and "finetune" not in start:
        return False
    return start.lower().startswith(STARTS[file.suffix])


def _write_files(data: dict[str, Any], files: Sequence[Path], plot_folder: Path | None) -> list[Path]:
    """Write every file that was asked for, and return them."""
    written = []
    try:
        for file in files:
            _write_file(data, file)
            written.append(file)
        if plot_folder is not None:
            from ..report.plots import write_plots

            written += write_plots(data, plot_folder)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or file} cannot be written: {error.strerror}. "
            "Give a place that you may write to."
        ) from error
    return written


def _write_file(data: dict[str, Any], file: Path) -> None:
    from ..report import formats
    from ..storage.atomic import replacing, write_json_atomic

    if file.suffix == ".json":
        write_json_atomic(file, data)
        return
    if file.suffix == ".html":
        from ..report.html import write_report

        write_report(data, file)
        return
    writers: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        ".csv": ("", formats.write_csv),
        ".md": ("<!-- finetune compare -->\n", formats.write_markdown),
        ".tex": ("% finetune compare\n", formats.write_latex),
    }
    heading, write = writers[file.suffix]
    with replacing(file) as temporary:
        temporary.write_text(heading + write(data), encoding="utf-8")


def reproduce(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)
    ],
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the repeated run here; by default it is removed."),
    ] = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Train a finished run again: is it identical, within the interval of its seeds, or neither (exit 1)?"""
    from ..artifacts.reproduce import reproduce as reproduce_run
    from ..storage.atomic import to_json_value

    found = reproduce_run(run, keep, load_plugins(plugins))
    if as_json:
        print(json.dumps(to_json_value(found), indent=2, allow_nan=False))
    else:
        print(found["words"])
        for name, (before, now) in found["differs"].items():
            print(f"  {name}: {before} before, {now} now")
        if found["kept"]:
            print(f"  kept in {found['kept']}")
    raise typer.Exit(1 if found["verdict"] == "different" else 0)
