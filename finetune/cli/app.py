"""The command line: thin, and quick to start, since whatever is heavy is imported inside the commands."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from ..errors import ConfigError, FinetuneError, visible
from . import artifacts as cli_finished
from . import results as cli_report
from . import sweep as cli_sweep
from .display import show_table, show_tree

if TYPE_CHECKING:
    from ..config.settings import Config
    from ..system.signals import Signals

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
LENIENT = {
    "ignore_unknown_options": True
}  # stray --flags reach the overrides, where one message with a cure refuses them

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings, for example method=lora method.rank=16 seed=1.",
        show_default=False,
    ),
]
ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir",
        metavar="DIR",
        help="Your own YAML groups; they win over built-in ones of the same name.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="A run's frozen config.yaml; only values can be changed on top."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


app.command("sweep", context_settings=LENIENT)(cli_sweep.sweep)
app.command()(cli_report.compare)
app.command()(cli_report.reproduce)
app.command("eval", context_settings=LENIENT)(cli_finished.evaluate)
for command in (cli_finished.merge, cli_finished.export, cli_finished.inspect, cli_finished.compose):
    app.command(context_settings=LENIENT)(command)
app.command(context_settings=LENIENT)(cli_finished.verify)


@app.callback()
def finetune(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, help="Print the version and exit.", callback=lambda on: _version(on)
        ),
    ] = False,
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
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with the run in this folder, as it was started."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many processes of this machine train together, each on a GPU of its own; by default one, or as many as before.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained and stored; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one method on one model and one data set. Without settings: SNELL on the built-in model and digits.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP save at the end of the step, tell the command to go on, and exit with 130; a second one ends at once.
    """
    from ..system.signals import CODE, Interrupted, Signals

    folder: Path | None = None
    try:
        with Signals() as signals:
            config, folder = _asked(overrides or [], config_dir, config_file, resume)
            if dry_run:
                from ..training.plan import plan

                show_tree(plan(config), as_json)
            else:
                processes = processes or _as_before(folder)
                _train(config, folder, signals, processes, as_json)
    except Interrupted as stop:
        from ..launch.resume import command

        with suppress(OSError):  # after SIGHUP nobody may be there to read it
            _tell(f"Stopped by {stop.name}{stop.saved}. To go on: {command(folder, processes or 1)}")
        raise typer.Exit(CODE) from None


def _asked(
    overrides: list[str], config_dir: Path | None, config_file: Path | None, resume: Path | None
) -> tuple[Config, Path]:
    """The configuration to train, and where its run lies."""
    if resume is None:
        from ..config.load import load
        from ..storage.run_folder import run_folder

        config = load(overrides, config_dir, config_file)
        return config, run_folder(config)
    if config_dir or config_file:
        raise ConfigError(
            f"--resume {resume} goes with neither --config nor --config-dir: the run's own config.yaml is complete."
        )
    from ..launch.resume import frozen

    return frozen(resume, overrides), resume


def _as_before(folder: Path) -> int:
    """How many processes go on with the run in ``folder``: those that a launcher has started, or as many as it had."""
    from ..launch import resume

    before = 1 if "LOCAL_RANK" in os.environ else resume.processes(folder) or 1
    if before > 1:
        _tell(f"Going on with {before} processes, as before (--processes takes another number).")
    return before


def _train(config: Config, folder: Path, signals: Signals, processes: int, as_json: bool) -> None:
    from ..launch.ranks import launch, work
    from ..report.summary import summary
    from ..storage.run_folder import RunFolder
    from ..system.environment import rank

    files = RunFolder(folder)
    if files.finished:
        files.open_or_check(config)
        _tell(f"{folder} holds the finished result of this very run, so nothing was run again.")
        result = files.read_result()
    else:
        result = launch(config, folder, processes) if processes > 1 else work(config, folder, signals)
    if not rank():
        print(json.dumps(result, indent=2) if as_json else summary(result, folder))


def _tell(line: str, always: bool = False) -> None:
    """A line on standard error. Of several processes that a launcher started the first one speaks, and another only what the first cannot know."""
    from ..system.environment import rank

    if always or not rank():
        print(f"Process {rank()}: {line}" if rank() else line, file=sys.stderr, flush=True)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods: name, family, what they train, paper."""
    from ..registry import catalog

    rows = [
        {
            "name": e.name,
            **{fact: e.facts.get(fact, "") for fact in ("family", "trains", "paper")},
            "about": e.doc,
        }
        for e in catalog("method").values()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        show_table([{key: value for key, value in row.items() if key != "about"} for row in rows])


@app.command(context_settings=LENIENT)
def show(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the resolved settings, each with where it came from."""
    from ..config.load import tree

    leaves = tree(overrides or [], config_dir, config_file)
    if as_json:
        print(
            json.dumps(
                {key: {"value": value, "from": origin} for key, (value, origin) in leaves.items()}, indent=2
            )
        )
    else:
        lines = {f"{key}: {json.dumps(value)}": origin for key, (value, origin) in leaves.items()}
        width = min(max(map(len, lines)), 60)
        print(*(f"{line:<{width}}  # {origin}" for line, origin in lines.items()), sep="\n")


def main() -> None:
    """Run the command line. Ends with 0, or 1 for a failed run, or 2 for a mistake of the user's; never shows a traceback unasked."""
    try:
        app()
    except ConfigError as error:
        for fault in error.faults:
            _tell(f"Error: {fault}")
        sys.exit(error.exit_code)
    except FinetuneError as error:
        _tell(f"Error: {visible(str(error))}", always=isinstance(error.__cause__, OSError))  # of its own disk
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("FINETUNE_DEBUG") == "1":
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _tell(
                f"Error: {visible(str(error.filename))[:60]}... is too long for the name of a file or folder. Give a shorter one."
            )
            sys.exit(ConfigError.exit_code)
        with tempfile.NamedTemporaryFile("w", prefix="finetune-", suffix=".log", delete=False) as log:
            log.write(traceback.format_exc())
        what = visible(f"{type(error).__name__}: {error}")
        _tell(
            f"Error: finetune failed unexpectedly: {what} (details in {log.name}; FINETUNE_DEBUG=1 shows them)",
            always=True,
        )
        sys.exit(1)
