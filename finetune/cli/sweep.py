"""The command ``finetune sweep``: many runs that are checked first, survive whatever ends them, and are watched while they go."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, near
from .options import Plugins, load_plugins

if TYPE_CHECKING:
    from ..sweep import Point

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings; those with several values are swept: method=lora,snell seed=0,1."
    ),
]
SweepName = Annotated[
    str | None,
    typer.Option(
        "--sweep", metavar="NAME", help="The settings of conf/sweep/NAME.yaml; the same as sweep=NAME."
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The folder, outputs/NAME; the same as name=NAME."),
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
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", min=1, help="How many runs at once; by default one, or one per GPU.", show_default=False
    ),
]
LauncherName = Annotated[
    str,
    typer.Option("--launcher", metavar="NAME", help="local, joblib, slurm or ray, with launcher.KEY=VALUE."),
]
Retry = Annotated[bool, typer.Option("--retry", help="Run again what had failed before.")]
Attempts = Annotated[
    int,
    typer.Option(
        "--attempts",
        min=1,
        help="How often a run may be started before it counts as failed; --launcher local only.",
    ),
]
FailFast = Annotated[
    bool, typer.Option("--fail-fast", help="End at the first failure; --launcher local only.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="List the runs with the time and memory they should take; run nothing."),
]
MaxRuns = Annotated[
    int, typer.Option("--max-runs", min=1, help="The largest grid that is run without asking.")
]
Watch = Annotated[
    Path | None,
    typer.Option(
        "--watch", metavar="DIR", help="Show the sweep in DIR, which another shell runs, until it ends."
    ),
]
Search = Annotated[
    str | None,
    typer.Option(
        "--search", metavar="optuna", help="Search interval(...) and choice(...) instead of running a grid."
    ),
]
Trials = Annotated[
    int | None,
    typer.Option("--trials", min=1, help="How many trials --search makes in all, or tune= per setting."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
OF_SEARCH = (
    "--search",
    "--trials",
    "--sweep",
    "--name",
    "--config-dir",
    "--config",
    "--jobs",
    "--attempts",
    "--fail-fast",
    "--plugins",
    "--json",
)


@dataclass(frozen=True)
class Asked:
    """The words of the command line by what they are for."""

    settings: list[str]
    launcher: list[str]
    tune: list[str]


def sweep(
    context: typer.Context,
    overrides: Overrides = None, preset: SweepName = None, name: Name = None, config_dir: ConfigDir = None, config_file: ConfigFile = None,
    jobs: Jobs = None, launcher: LauncherName = "local", retry: Retry = False, attempts: Attempts = 1, fail_fast: FailFast = False,
    dry_run: DryRun = False, max_runs: MaxRuns = 500, watch: Watch = None, search: Search = None, trials: Trials = None, plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run the cross product of all values: method=lora,snell seed=0,1. The same command again goes on: finished runs are skipped."""
    if watch:
        raise typer.Exit(
            _watch(
                watch,
                [text for option, text in _typed(context).items() if option != "--watch"] + (overrides or []),
            )
        )
    asked = _asked(overrides or [], preset, name)
    if search or (trials and not asked.tune):
        _check_search(_typed(context), asked, search, trials)
    elif launcher != "local":
        _check_launcher(_typed(context), launcher)
    options = load_plugins(plugins)
    from ..sweep import launch, points, tune
    from ..sweep.watch import Board
    from ..sweep.work import Work

    where = launch.launcher(launcher, asked.launcher, config_dir)
    searched, tuning = None, None
    with Board() as board:
        try:
            if search and trials:
                from ..sweep import search as searching

                searched = searching.run(
                    asked.settings, trials, None, jobs, config_dir=config_dir, config_file=config_file, attempts=attempts, fail_fast=fail_fast,
                    board=board, command=_command(), options=options,
                )  # fmt: skip
            else:
                runs = points(asked.settings, config_dir, config_file, max_runs=max_runs, say=board.say)
                tuning = tune.plan(runs, asked.tune[0], trials or 5) if asked.tune else None
                if dry_run:
                    from ..sweep.forecast import forecast
                    from .sweep_tables import show_forecast

                    show_forecast(forecast(runs, jobs or 1, retry, board.say, None, tuning, options), as_json)
                    return
                work = Work(
                    where,
                    jobs,
                    board,
                    [*asked.settings, *(f"tune={text}" for text in asked.tune)],
                    _command(),
                    retry,
                    attempts,
                    fail_fast,
                    options,
                )
                runs, found = work.run(runs, tuning)
        except KeyboardInterrupt as error:
            by = f" by {error}" if str(error) else ""
            print(f"Interrupted{by}. What is finished is kept; to go on: {_command()}", file=sys.stderr)
            raise typer.Exit(130) from None
    if searched is not None:
        raise typer.Exit(_report_search(searched, as_json))
    raise typer.Exit(_report(runs, tuning.tried if tuning else [], found, as_json))


def _asked(words: Sequence[str], preset: str | None, name: str | None) -> Asked:
    """Sort the words. Raises ``ConfigError`` where an option and a word say the same thing."""
    settings = [word for word in words if not word.startswith(("launcher.", "tune="))]
    for option, key in ((preset, "sweep"), (name, "name")):
        if option is not None:
            if any(word.startswith(f"{key}=") for word in settings):
                raise ConfigError(f"--{key} {option} and {key}= are the same setting; keep one of them.")
            settings.append(f"{key}={option}")
    tune = [word.removeprefix("tune=") for word in words if word.startswith("tune=")]
    if len(tune) > 1:
        raise ConfigError(f"tune={tune[0]} and tune={tune[1]}: one parameter can be tuned; keep one of them.")
    return Asked(settings, [word for word in words if word.startswith("launcher.")], tune)


def _watch(folder: Path, others: Sequence[str]) -> int:
    from ..sweep.watch import watch

    if others:
        raise ConfigError(
            f"{', '.join(others)}: --watch {folder} only shows a sweep that another shell runs; it takes no settings and no options."
        )
    try:
        return watch(folder)
    except KeyboardInterrupt:
        return 0


def _typed(context: typer.Context) -> dict[str, str]:
    """The options that were typed, each as it can be typed again."""
    given = {
        p.opts[0]: context.params[p.name]
        for p in context.command.params
        if p.name and _from_command_line(context, p.name)
    }
    return {
        option: option if value is True else f"{option} {value}"
        for option, value in given.items()
        if option.startswith("--")
    }


def _from_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_search(typed: dict[str, str], asked: Asked, search: str | None, trials: int | None) -> None:
    """Raises ``ConfigError`` with all that is wrong with what a search is asked for."""
    if search is None:
        raise ConfigError(f"--trials {trials} belongs to tune=KEY or to --search optuna; give one of them.")
    faults = (
        []
        if search == "optuna"
        else [f"--search {search} is not a search.{near(search, ['optuna'])} There is: optuna."]
    )
    if not trials:
        faults.append(f"--search {search} needs to know how many trials it makes: --trials 20, for example.")
    foreign = [
        text for option, text in typed.items() if option not in OF_SEARCH and text != "--launcher local"
    ]
    foreign += [*asked.launcher, *(f"tune={text}" for text in asked.tune)]
    if foreign:
        faults.append(
            f"{', '.join(foreign)}: without meaning for --search, which chooses its trials one after another by what the earlier ones found, on this "
            "machine, and runs none again. Leave it out, or --search."
        )
    if faults:
        raise ConfigError(*faults)


def _check_launcher(typed: dict[str, str], launcher: str) -> None:
    """Raises ``ConfigError`` with the options that a cluster cannot obey."""
    faults = []
    if foreign := [typed[option] for option in ("--attempts", "--fail-fast") if option in typed]:
        faults.append(
            f"{', '.join(foreign)}: only --launcher local has that; --launcher {launcher} hands over all runs at once. Leave it out."
        )
    if "--jobs" in typed and (
        cure := {"slurm": "Write launcher.array_parallelism=N.", "ray": "Ray's cluster decides."}.get(
            launcher
        )
    ):
        faults.append(f"{typed['--jobs']} is nothing that --launcher {launcher} takes. {cure}")
    if faults:
        raise ConfigError(*faults)


def _report_search(results: Sequence[tuple[Point, dict[str, Any]]], as_json: bool) -> int:
    """Print the trials; the exit code."""
    from .sweep_tables import show, show_search

    if as_json:
        show(results, as_json)
    else:
        show_search(results)
    return 1 if any(result["status"] == "failed" for _, result in results) else 0


def _command() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["finetune", *sys.argv[1:]])


def _report(
    runs: Sequence[Point], tried: Sequence[Point], found: dict[Path, dict[str, Any]], as_json: bool
) -> int:
    """Print the results of the runs, and what went wrong with them and with the trials of ``tune=``; the exit code."""
    from .sweep_tables import show

    show([(point, found[point.folder.path]) for point in runs if point.folder.path in found], as_json)
    left = {"status": "not finished", "error": "the same command goes on with it"}
    wrong = [
        (point, result)
        for point in [*tried, *runs]
        if (result := found.get(point.folder.path, left))["status"] != "finished"
    ]
    for point, result in wrong:
        print(f"Error: {point.folder.path} {result['status']}: {result['error']}", file=sys.stderr)
    return 1 if wrong else 0
