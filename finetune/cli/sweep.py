"""The command ``finetune sweep``: check many runs, run them, show them, continue after an interruption."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, suggest_nearest
from ..system.exit_code import INTERRUPTED
from .options import ConfigDir, ConfigFile, Plugins, load_plugins

if TYPE_CHECKING:
    from ..sweep import Point
    from ..sweep.work import Work

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
Retry = Annotated[bool, typer.Option("--retry", help="Run failed runs again.")]
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
    typer.Option("--dry-run", help="List the runs with their expected time and memory; run nothing."),
]
MaxRuns = Annotated[int, typer.Option("--max-runs", min=1, help="Refuse a grid of more runs.")]
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
    typer.Option(
        "--trials",
        min=1,
        help="Number of trials: of the whole --search, or of each configuration with tune=.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
FOR_SEARCH = (  # options that can be combined with --search
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
TRIALS = 5  # of tune=, for each configuration


@dataclass(frozen=True)
class Words:
    """The words of the command line, sorted by purpose.

    ``settings`` choose the runs, ``launcher`` are settings of the launcher, and ``tune`` is the value of
    ``tune=``.
    """

    settings: list[str]
    launcher: list[str]
    tune: str | None


@dataclass(frozen=True)
class Configs:
    """The user's own sources of configurations, read besides the built-in ones."""

    config_dir: Path | None
    config_file: Path | None


def sweep(
    context: typer.Context,
    # what is run
    overrides: Overrides = None,
    preset: SweepName = None,
    name: Name = None,
    config_dir: ConfigDir = None,
    config_file: ConfigFile = None,
    plugins: Plugins = None,
    # how it is run
    jobs: Jobs = None,
    launcher: LauncherName = "local",
    retry: Retry = False,
    attempts: Attempts = 1,
    fail_fast: FailFast = False,
    # what is done instead of a run of the whole grid
    dry_run: DryRun = False,
    max_runs: MaxRuns = 500,
    watch: Watch = None,
    search: Search = None,
    trials: Trials = None,
    # how it is shown
    as_json: AsJson = False,
) -> None:
    """Run the cross product of all values: method=lora,snell seed=0,1.

    Repeating the command continues the sweep: finished runs are skipped.
    """
    typed = _typed_options(context)
    if watch:
        del typed["--watch"]
        raise typer.Exit(_watch(watch, [*typed.values(), *(overrides or [])]))
    words = _sort_words(overrides or [], preset, name)
    if search or (trials and words.tune is None):
        _check_search(typed, words, search, trials)
    elif launcher != "local":
        _check_launcher(typed, launcher)
    options = load_plugins(plugins)
    from ..sweep import cluster
    from ..sweep.watch import Board
    from ..sweep.work import Work

    configs = Configs(config_dir, config_file)
    settings = list(words.settings)
    if words.tune is not None:
        settings.append(f"tune={words.tune}")
    with Board() as board:
        work = Work(
            settings=settings,
            command=_command(),
            jobs=jobs,
            launcher=cluster.choose_launcher(launcher, words.launcher, config_dir),
            board=board,
            retry=retry,
            attempts=attempts,
            fail_fast=fail_fast,
            options=options,
        )
        try:
            if search and trials:
                report = _run_search(work, trials, configs, as_json)
            else:
                report = _run_grid(work, words, trials or TRIALS, configs, max_runs, dry_run, as_json)
        except KeyboardInterrupt as error:
            by = f" by {error}" if str(error) else ""
            print(f"Interrupted{by}. Finished runs are kept. To continue: {_command()}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(report())


def _run_search(work: Work, trials: int, configs: Configs, as_json: bool) -> Callable[[], int]:
    """Run a search; return the function that prints its trials and returns the exit code."""
    from ..sweep import search

    results = search.run(work, trials, configs.config_dir, configs.config_file)

    def report() -> int:
        from .sweep_tables import show, show_search

        if as_json:
            show(results, as_json)
        else:
            show_search(results)
        return 1 if any(result["status"] == "failed" for _, result in results) else 0

    return report


def _run_grid(
    work: Work, words: Words, trials: int, configs: Configs, max_runs: int, dry_run: bool, as_json: bool
) -> Callable[[], int]:
    """Run or forecast a grid; return the function that prints the results and returns the exit code."""
    from ..sweep import list_points, tune

    runs = list_points(
        words.settings, configs.config_dir, configs.config_file, max_runs=max_runs, say=work.board.say
    )
    tuning = None if words.tune is None else tune.plan(runs, words.tune, trials)
    if dry_run:
        from ..sweep.forecast import forecast

        foreseen = forecast(runs, work.jobs or 1, work.retry, work.board.say, tuning, work.options)

        def report_forecast() -> int:
            from .sweep_tables import show_forecast

            show_forecast(foreseen, as_json)
            return 0

        return report_forecast
    runs, found = work.run(runs, tuning)
    return lambda: _report(runs, tuning.trials if tuning else [], found, as_json)


def _report(
    runs: Sequence[Point], trials: Sequence[Point], found: dict[Path, dict[str, Any]], as_json: bool
) -> int:
    """Print the results of the runs, and what went wrong in them and in the trials; return the exit code."""
    from .sweep_tables import show

    show([(point, found[point.folder.path]) for point in runs if point.folder.path in found], as_json)
    missing = {"status": "not finished", "error": "the same command resumes it"}
    code = 0
    for point in [*trials, *runs]:
        result = found.get(point.folder.path, missing)
        if result["status"] != "finished":
            print(f"Error: {point.folder.path} {result['status']}: {result['error']}", file=sys.stderr)
            code = 1
    return code


def _watch(folder: Path, others: Sequence[str]) -> int:
    """Show the sweep in ``folder`` until it ends; return the exit code.

    ``others`` are all other words that were typed.
    """
    from ..sweep.watch import watch

    if others:
        raise ConfigError(
            f"{', '.join(others)}: --watch {folder} only shows a sweep that another shell runs; it takes no "
            "settings and no options."
        )
    try:
        return watch(folder)
    except KeyboardInterrupt:
        return 0


def _sort_words(words: Sequence[str], preset: str | None, name: str | None) -> Words:
    """Sort the words. Raises ``ConfigError`` if an option and a word set the same thing."""
    settings, launcher, tune = list[str](), list[str](), list[str]()
    for word in words:
        if word.startswith("launcher."):
            launcher.append(word)
        elif word.startswith("tune="):
            tune.append(word)
        else:
            settings.append(word)
    for option, key in ((preset, "sweep"), (name, "name")):
        if option is None:
            continue
        if any(word.startswith(f"{key}=") for word in settings):
            raise ConfigError(f"--{key} {option} and {key}= are the same setting; keep one of them.")
        settings.append(f"{key}={option}")
    if len(tune) > 1:
        raise ConfigError(f"{tune[0]} and {tune[1]}: only one setting can be tuned; keep one of them.")
    return Words(settings, launcher, tune[0].removeprefix("tune=") if tune else None)


def _typed_options(context: typer.Context) -> dict[str, str]:
    """Return the options that were typed, by their names on the command line."""
    typed = {}
    for parameter in context.command.params:
        option, source = parameter.opts[0], context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or not option.startswith("--"):
            continue
        value = context.params[parameter.name or ""]
        typed[option] = option if value is True else f"{option} {value}"
    return typed


def _check_search(typed: dict[str, str], words: Words, search: str | None, trials: int | None) -> None:
    """Raise ``ConfigError`` with everything that is wrong with the options of a search."""
    if search is None:
        raise ConfigError(f"--trials {trials} belongs to tune=KEY or to --search optuna; give one of them.")
    faults = []
    if search != "optuna":
        faults.append(
            f"--search {search} is not a search.{suggest_nearest(search, ['optuna'])} There is: optuna."
        )
    if not trials:
        faults.append(f"--search {search} needs the number of trials, for example --trials 20.")
    foreign = [text for option, text in typed.items() if option not in FOR_SEARCH]
    foreign = [text for text in foreign if text != "--launcher local"]
    foreign += words.launcher
    if words.tune is not None:
        foreign.append(f"tune={words.tune}")
    if foreign:
        faults.append(
            f"{', '.join(foreign)} cannot be combined with --search. A search runs on this machine, chooses "
            "each trial by the results of earlier ones, and repeats none. Leave one of the two out."
        )
    if faults:
        raise ConfigError(*faults)


def _check_launcher(typed: dict[str, str], launcher: str) -> None:
    """Raise ``ConfigError`` with the options that have no effect on a cluster."""
    faults = []
    local = [typed[option] for option in ("--attempts", "--fail-fast") if option in typed]
    if local:
        faults.append(
            f"{', '.join(local)}: only --launcher local supports this; --launcher {launcher} hands over all "
            "runs at once. Leave it out."
        )
    cures = {"slurm": "Write launcher.array_parallelism=N.", "ray": "Ray's cluster decides."}
    if "--jobs" in typed and launcher in cures:
        faults.append(f"{typed['--jobs']} has no effect with --launcher {launcher}. {cures[launcher]}")
    if faults:
        raise ConfigError(*faults)


def _command() -> str:
    """Return the command that was typed, quoted for a shell."""
    return shlex.join(["finetune", *sys.argv[1:]])
