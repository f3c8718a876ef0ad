"""Define the command line. Modules that take time to import are imported inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..system.exit_code import exit_code_of
from ..system.version import __version__
from . import artifacts, passes, results, sweep
from .display import show_table, show_tree
from .options import ConfigDir, ConfigFile, Plugins, load_plugins, start_options

if TYPE_CHECKING:
    from ..config.settings import Config

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
# Unknown options reach the overrides, where one message with a cure refuses them.
LENIENT = {"ignore_unknown_options": True}

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings, for example method=lora method.rank=16 seed=1.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


app.command("sweep", context_settings=LENIENT)(sweep.sweep)
app.command()(results.compare)
app.command()(results.reproduce)
app.command("eval", context_settings=LENIENT)(artifacts.evaluate)
for command in (
    artifacts.merge,
    artifacts.export,
    artifacts.inspect,
    artifacts.analyze,
    artifacts.compose,
):
    app.command(context_settings=LENIENT)(command)
app.command(context_settings=LENIENT)(artifacts.verify)
app.command(context_settings=LENIENT)(passes.prune)
app.command(context_settings=LENIENT)(passes.fold)
app.command(context_settings=LENIENT)(passes.compress)


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
            help="Number of processes on this machine that train together, each on a GPU of its own. "
            "Default: one, or as many as trained the run before.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained and stored; train nothing.")
    ] = False,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Train one method on one model and one data set. Without settings: SNELL, the built-in model, digits.

    After SIGINT (Ctrl-C), SIGTERM or SIGHUP the run saves at the end of the step, prints the command that
    resumes it, and exits with 130. A second signal ends it at once.
    """
    from ..launch import child

    options = start_options(plugins)

    def read() -> tuple[Config, Path]:
        options.apply()
        return _run_to_train(overrides or [], config_dir, config_file, resume)

    def report(result: dict[str, Any], folder: Path) -> None:
        from ..report.summary import describe_result

        print(json.dumps(result, indent=2) if as_json else describe_result(result, folder))

    def preview(config: Config) -> None:
        from ..training.plan import plan

        show_tree(plan(config), as_json)

    raise typer.Exit(child.train(read, options, processes, report, preview if dry_run else None))


def _run_to_train(
    overrides: list[str], config_dir: Path | None, config_file: Path | None, resume: Path | None
) -> tuple[Config, Path]:
    """Return the configuration to train, and the folder of its run."""
    if resume is None:
        from ..config.load import load
        from ..storage.run_folder import run_folder

        config = load(overrides, config_dir, config_file)
        return config, run_folder(config)
    if config_dir or config_file:
        raise ConfigError(
            f"--resume {resume} goes with neither --config nor --config-dir: the run's own config.yaml is "
            "complete. Leave them out."
        )
    from ..launch.resume import frozen

    return frozen(resume, overrides), resume


@app.command()
def methods(plugins: Plugins = None, as_json: AsJson = False) -> None:
    """List the methods: name, family, what they train, paper."""
    load_plugins(plugins)
    from ..registry import catalog

    rows = []
    for entry in catalog("method").values():
        row = {"name": entry.name}
        for fact in ("family", "trains", "paper"):
            row[fact] = entry.facts.get(fact, "")
        if as_json:  # too long for a table
            row["about"] = entry.doc
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        show_table(rows)


@app.command(context_settings=LENIENT)
def show(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    config_file: ConfigFile = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show the resolved settings, each with where it came from."""
    load_plugins(plugins)
    from ..config.load import tree

    leaves = tree(overrides or [], config_dir, config_file)
    if as_json:
        shown = {key: {"value": value, "from": origin} for key, (value, origin) in leaves.items()}
        print(json.dumps(shown, indent=2))
        return
    lines = {f"{key}: {json.dumps(value)}": origin for key, (value, origin) in leaves.items()}
    width = min(max(map(len, lines)), 60)
    for line, origin in lines.items():
        print(f"{line:<{width}}  # {origin}")


def main() -> None:
    """Run the command line and exit: 0, 1 for a failed run, 2 for a user's mistake, 130 after a signal."""
    sys.exit(exit_code_of(app))
