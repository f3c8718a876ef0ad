"""The command line: thin, and quick to start, since whatever is heavy is imported inside the commands."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, cli_report, cli_sweep
from .display import show_table, show_tree
from .errors import ConfigError, FinetuneError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
LENIENT = {"ignore_unknown_options": True}  # stray --flags reach the overrides, where one message with a cure refuses them

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, for example method=lora method.rank=16 seed=1.", show_default=False)
]
ConfigDir = Annotated[
    Path | None, typer.Option("--config-dir", metavar="DIR", help="Your own YAML groups; they win over built-in ones of the same name.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A run's frozen config.yaml; only values can be changed on top.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Checkpoint = Annotated[Path | None, typer.Option("--ckpt", metavar="PATH", help="The run folder; the same as ckpt=PATH.")]


app.command("sweep", context_settings=LENIENT)(cli_sweep.sweep)
app.command()(cli_report.compare)
app.command()(cli_report.reproduce)


@app.callback()
def finetune(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.", callback=lambda on: _version(on))] = False,
) -> None:
    """The lab bench for sparse and parameter-efficient fine-tuning."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"finetune {__version__}")
        raise typer.Exit


@app.command(context_settings=LENIENT)
def train(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    config_file: ConfigFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained and stored; train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one method on one model and one data set. Without settings: SNELL on the built-in model and digits."""
    from .config import load
    from .progress import ProgressBar
    from .report.summary import summary
    from .train.files import RunFolder, run_folder

    config = load(overrides or [], config_dir, config_file)
    folder = RunFolder(run_folder(config))
    if dry_run:
        from .train import run

        show_tree(run.plan(config), as_json)
        return
    if folder.finished:
        folder.open_or_check(config)
        print(f"{folder.path} holds the finished result of this very run, so nothing was run again.", file=sys.stderr)
        result = folder.read_result()
    else:
        from .train import run

        with ProgressBar() as progress:
            result = run.train(config, folder.path, progress.say, progress)
    print(json.dumps(result, indent=2) if as_json else summary(result, folder.path))


@app.command("eval", context_settings=LENIENT)
def evaluate(overrides: Overrides = None, ckpt: Checkpoint = None, config_dir: ConfigDir = None, as_json: AsJson = False) -> None:
    """Evaluate a run again from its stored change: ckpt=RUN, on another data set with dataset=..."""
    run_path, rest = _checkpoint(overrides or [], ckpt)
    wrong = [text for text in rest if not text.startswith(("dataset=", "dataset."))]
    if wrong:
        raise ConfigError(*(f"{text}: eval takes ckpt=RUN and settings of the data set; all else is as in the run." for text in wrong))
    dataset = _dataset(rest, run_path, config_dir) if rest else None
    from .train import finished

    show_tree(finished.evaluate(run_path, dataset), as_json)


@app.command(context_settings=LENIENT)
def merge(
    overrides: Overrides = None,
    ckpt: Checkpoint = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The largest accepted difference of logits between merged and unmerged; by default, what the dtype allows.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write base and change as one plain Hugging Face folder: ckpt=RUN out=DIR."""
    run_path, rest = _checkpoint(overrides or [], ckpt)
    outs = [text.partition("=")[2] for text in rest if text.startswith("out=")]
    wrong = [text for text in rest if not text.startswith("out=")]
    if wrong or len(outs) != 1 or not outs[0]:
        raise ConfigError(
            *(f"{text}: merge takes ckpt=RUN out=DIR." for text in wrong),
            *([] if len(outs) == 1 else ["merge needs one out=DIR, a folder to write."]),
        )
    from .train import finished

    show_tree(finished.merge(run_path, Path(outs[0]), tolerance), as_json)


@app.command(context_settings=LENIENT)
def inspect(
    words: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="The run folder, or ckpt=RUN.", show_default=False)] = None,
    rank: Annotated[int, typer.Option(min=1, help="How many singular directions count as principal.")] = 32,
    alpha: Annotated[float, typer.Option(min=0.001, max=0.999, help="The share of the entries that the principal and the low mask have.")] = 0.5,
    gradient: Annotated[int, typer.Option(min=0, help="Compare with the largest gradients of so many training batches, too.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a run changed: how much, in which roles and depths, along which directions. Plots go to RUN/inspect/."""
    from rich.console import Console

    from .report import inspection

    run_path, _ = _checkpoint([word if word.startswith("ckpt=") else f"ckpt={word}" for word in words or []], None)
    from .train.inspect import inspect as look

    result = look(run_path, rank, alpha, gradient)
    try:
        made = inspection.plots(result, Path(result["folder"]))
    except OSError as error:
        made = []
        print(f"Warning: no plots were written to {result['folder']}: {error.strerror}.", file=sys.stderr)
    if as_json:
        print(json.dumps({**result, "plots": [str(file) for file in made]}, indent=2))
        return
    if result["total"]:
        Console().print(inspection.InspectionTable(result))
    print(*inspection.summary(result), *(str(file) for file in made), sep="\n")


@app.command(context_settings=LENIENT)
def compose(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="RUN... out=DIR", help="The runs; weights=1,0.5 and head=RUN if wanted.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add the sparse changes of runs on one base, as a folder for eval and merge. The head is that of the last run, or of head=RUN."""
    runs, given, faults = list[Path](), dict[str, str](), list[str]()
    for word in words or []:
        key, sign, value = word.partition("=")
        if sign and key in ("out", "weights", "head"):
            faults += [f"{word}: {key} is given twice."] if key in given else []
            given[key] = value
        elif Path(word).exists():
            runs.append(Path(word))
        else:
            faults.append(f"{word} is neither a run folder nor out=DIR, weights=1,0.5 or head=RUN.")
    if not given.get("out"):
        faults.append("compose needs one out=DIR, a folder to write.")
    weights = None
    if "weights" in given:
        try:
            weights = [float(number) for number in given["weights"].split(",")]
        except ValueError:
            faults.append(f"weights={given['weights']} is not a list of numbers, such as weights=1,0.5.")
    if faults:
        raise ConfigError(*faults)
    from .train.compose import compose as add

    told = add(runs, Path(given["out"]), weights, Path(given["head"]) if given.get("head") else None)
    if not as_json:
        told["layers"] = f"{len(told['layers'])}, each in {Path(given['out']) / 'compose.json'}"
    show_tree(told, as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods: name, family, what they train, paper."""
    from .registry import catalog

    rows = [
        {"name": e.name, **{fact: e.facts.get(fact, "") for fact in ("family", "trains", "paper")}, "about": e.doc}
        for e in catalog("method").values()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        show_table([{key: value for key, value in row.items() if key != "about"} for row in rows])


@app.command(context_settings=LENIENT)
def show(overrides: Overrides = None, config_dir: ConfigDir = None, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show the resolved settings, each with where it came from."""
    from .config import tree

    leaves = tree(overrides or [], config_dir, config_file)
    if as_json:
        print(json.dumps({key: {"value": value, "from": origin} for key, (value, origin) in leaves.items()}, indent=2))
    else:
        lines = {f"{key}: {json.dumps(value)}": origin for key, (value, origin) in leaves.items()}
        width = min(max(map(len, lines)), 60)
        print(*(f"{line:<{width}}  # {origin}" for line, origin in lines.items()), sep="\n")


def _checkpoint(words: list[str], ckpt: Path | None) -> tuple[Path, list[str]]:
    """The one run that is named, and the other words. Its path is taken as typed: Hydra's grammar would refuse ``epoch=3.pt``."""
    given = [word.removeprefix("ckpt=") for word in words if word.startswith("ckpt=")] + ([str(ckpt)] if ckpt else [])
    if len(given) != 1:
        raise ConfigError(f"Name one run by ckpt=RUN or --ckpt PATH{f', not {len(given)}' if given else ''}; for example ckpt=outputs/NAME/RUN.")
    if not given[0] or not Path(given[0]).exists():
        raise ConfigError(f"ckpt={given[0]}: there is no such folder. Give a run folder, outputs/NAME/RUN.")
    return Path(given[0]), [word for word in words if not word.startswith("ckpt=")]


def _dataset(overrides: list[str], run_path: Path, config_dir: Path | None) -> Any:
    """The data set that ``overrides`` choose, or the run's own with other values."""
    from .config import load

    if any(text.startswith("dataset=") for text in overrides):
        return load(overrides, config_dir).dataset
    frozen = (folder / "config.yaml" for folder in (run_path, *run_path.parents))
    return load(overrides, config_dir, next((file for file in frozen if file.is_file()), run_path / "config.yaml")).dataset


def main() -> None:
    """Run the command line. Ends with 0, or 1 for a failed run, or 2 for a mistake of the user's; never shows a traceback unasked."""
    try:
        app()
    except ConfigError as error:
        for fault in error.faults:
            print(f"Error: {fault}", file=sys.stderr)
        sys.exit(error.exit_code)
    except FinetuneError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("FINETUNE_DEBUG") == "1":
            raise
        with tempfile.NamedTemporaryFile("w", prefix="finetune-", suffix=".log", delete=False) as log:
            log.write(traceback.format_exc())
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"Error: finetune failed unexpectedly: {what} (details in {log.name}; FINETUNE_DEBUG=1 shows them)", file=sys.stderr)
        sys.exit(1)
