"""The command ``finetune sweep``: many runs that are checked first, survive whatever ends them, and are watched while they go."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError, near

if TYPE_CHECKING:
    from .sweep import Point

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings; those with several values are swept: method=lora,snell seed=0,1.")
]
SweepName = Annotated[str | None, typer.Option("--sweep", metavar="NAME", help="The settings of conf/sweep/NAME.yaml; the same as sweep=NAME.")]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="The folder, outputs/NAME; the same as name=NAME.")]
ConfigDir = Annotated[
    Path | None, typer.Option("--config-dir", metavar="DIR", help="Your own YAML groups; they win over built-in ones of the same name.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A run's frozen config.yaml; only values can be changed on top.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="How many runs at once; by default one, or one per GPU.", show_default=False)]
LauncherName = Annotated[str, typer.Option("--launcher", metavar="NAME", help="local, joblib, slurm or ray, with launcher.KEY=VALUE.")]
Retry = Annotated[bool, typer.Option("--retry", help="Run again what had failed before.")]
Attempts = Annotated[int, typer.Option("--attempts", min=1, help="How often a run may be started before it counts as failed; --launcher local only.")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="End at the first failure; --launcher local only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs with the time and memory they should take; run nothing.")]
MaxRuns = Annotated[int, typer.Option("--max-runs", min=1, help="The largest grid that is run without asking.")]
Watch = Annotated[Path | None, typer.Option("--watch", metavar="DIR", help="Show the sweep in DIR, which another shell runs, until it ends.")]
Search = Annotated[str | None, typer.Option("--search", metavar="optuna", help="Search interval(...) and choice(...) instead of running a grid.")]
Trials = Annotated[int | None, typer.Option("--trials", min=1, help="How many trials --search makes in all, or tune= per setting.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
OF_SEARCH = ("--search", "--trials", "--sweep", "--name", "--config-dir", "--config", "--jobs", "--attempts", "--fail-fast", "--json")


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
    dry_run: DryRun = False, max_runs: MaxRuns = 500, watch: Watch = None, search: Search = None, trials: Trials = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run the cross product of all values: method=lora,snell seed=0,1. The same command again goes on: finished runs are skipped."""
    asked = _asked(overrides or [], preset, name)
    if watch:
        raise typer.Exit(_watch(watch, asked))
    if search or (trials and not asked.tune):
        _check_search(_typed(context), asked, search, trials)
    elif launcher != "local":
        _check_launcher(_typed(context), launcher)
    from .sweep import launch, points, tune
    from .sweep.watch import Board

    where = launch.launcher(launcher, asked.launcher, config_dir)
    with Board() as board:
        try:
            if search and trials:
                from .sweep import search as searching

                searched = searching.run(
                    asked.settings, trials, None, jobs, config_dir=config_dir, config_file=config_file, say=board.say, look=board.look,
                    attempts=attempts, fail_fast=fail_fast,
                )  # fmt: skip
                raise typer.Exit(_report_search(searched, as_json))
            runs = points(asked.settings, config_dir, config_file, max_runs=max_runs, say=board.say)
            tuning = tune.plan(runs, asked.tune[0], trials or 5) if asked.tune else None
            if dry_run:
                from .sweep.forecast import forecast

                _show_forecast(forecast(runs, jobs or 1, retry, board.say, None, tuning), as_json)
                return
            work = _Work(where, jobs, board, retry, attempts, fail_fast)
            tried: list[Point] = []
            found: dict[Path, dict[str, Any]] = {}
            if tuning:
                tried = tuning.tried
                board.say(f"Tuning {tuning.asked.key} of {len(tuning.groups)} configurations by {trials or 5} trials each, on validation.")
                found = work.run(tried)
                runs = [] if work.over(tried, found) else tuning.settled(found, board.say)
            if runs:
                found |= work.run(runs, asked.settings)
        except KeyboardInterrupt as error:
            by = f" by {error}" if str(error) else ""
            print(f"Interrupted{by}. What is finished is kept; to go on: {_command()}", file=sys.stderr)
            raise typer.Exit(130) from None
    raise typer.Exit(_report(runs, tried, found, as_json))


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


@dataclass
class _Work:
    """How points are run, trials of ``tune=`` like others."""

    where: Any
    jobs: int | None
    board: Any
    retry: bool
    attempts: int
    fail_fast: bool
    failed: bool = False

    def run(self, runs: Sequence[Point], settings: Sequence[str] | None = None) -> dict[Path, dict[str, Any]]:
        """Freeze the points and run them; their results by folder."""
        from .sweep import freeze, launch
        from .sweep.pool import Pool, interruptible
        from .sweep.status import announced

        freeze(runs)
        gpus: list[str] | None = [] if all(point.config.train.device == "cpu" for point in runs) else None
        pool = Pool(
            self.jobs, self.board.say, retry=self.retry, attempts=self.attempts, fail_fast=self.fail_fast, look=self.board.look, gpus=gpus
        )  # fmt: skip
        with ExitStack() as stack:
            if settings is not None:
                stack.enter_context(announced(runs, settings, pool.places, _command()))
                self.board.show(runs[0].folder.path.parent)
            if self.where is None:
                found = pool.run(runs)
            else:
                with interruptible():
                    found = launch.run_all(runs, self.where, self.jobs, self.retry, self.board.say)
        self.failed = pool.failed
        return found

    def over(self, runs: Sequence[Point], found: Mapping[Path, Any]) -> bool:
        """Whether nothing may follow these runs: at the first failure, or since some have no result, which a cluster may leave."""
        return (self.fail_fast and self.failed) or any(point.folder.path not in found for point in runs)


def _watch(folder: Path, asked: Asked) -> int:
    from .sweep.watch import watch

    if asked.settings:
        raise ConfigError(f"{asked.settings[0]}: --watch {folder} only shows a sweep that another shell runs; it takes no settings.")
    try:
        return watch(folder)
    except KeyboardInterrupt:
        return 0


def _typed(context: typer.Context) -> dict[str, str]:
    """The options that were typed, each as it can be typed again."""
    given = {p.opts[0]: context.params[p.name] for p in context.command.params if p.name and _from_command_line(context, p.name)}
    return {option: option if value is True else f"{option} {value}" for option, value in given.items() if option.startswith("--")}


def _from_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_search(typed: dict[str, str], asked: Asked, search: str | None, trials: int | None) -> None:
    """Raises ``ConfigError`` with all that is wrong with what a search is asked for."""
    if search is None:
        raise ConfigError(f"--trials {trials} belongs to tune=KEY or to --search optuna; give one of them.")
    faults = [] if search == "optuna" else [f"--search {search} is not a search.{near(search, ['optuna'])} There is: optuna."]
    if not trials:
        faults.append(f"--search {search} needs to know how many trials it makes: --trials 20, for example.")
    foreign = [text for option, text in typed.items() if option not in OF_SEARCH and text != "--launcher local"]
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
        faults.append(f"{', '.join(foreign)}: only --launcher local has that; --launcher {launcher} hands over all runs at once. Leave it out.")
    if "--jobs" in typed and (cure := {"slurm": "Write launcher.array_parallelism=N.", "ray": "Ray's cluster decides."}.get(launcher)):
        faults.append(f"{typed['--jobs']} is nothing that --launcher {launcher} takes. {cure}")
    if faults:
        raise ConfigError(*faults)


def _report_search(results: Sequence[tuple[Point, dict[str, Any]]], as_json: bool) -> int:
    """Print the trials; the exit code."""
    if as_json:
        _show(results, as_json)
    else:
        _show_search(results)
    return 1 if any(result["status"] == "failed" for _, result in results) else 0


def _command() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["finetune", *sys.argv[1:]])


def _report(runs: Sequence[Point], tried: Sequence[Point], found: dict[Path, dict[str, Any]], as_json: bool) -> int:
    """Print the results of the runs, and what went wrong with them and with the trials of ``tune=``; the exit code."""
    _show([(point, found[point.folder.path]) for point in runs if point.folder.path in found], as_json)
    left = {"status": "not finished", "error": "the same command goes on with it"}
    wrong = [(point, result) for point in [*tried, *runs] if (result := found.get(point.folder.path, left))["status"] != "finished"]
    for point, result in wrong:
        print(f"Error: {point.folder.path} {result['status']}: {result['error']}", file=sys.stderr)
    return 1 if wrong else 0


def _show(results: Sequence[tuple[Point, dict[str, Any]]], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"run": str(point.folder.path), **result} for point, result in results], indent=2))
    elif results:
        from rich.console import Console

        from .report.comparison import compare
        from .report.formats import terminal
        from .train.files import plain

        console, folders = Console(), dict[Any, list[Path]]()
        for point, _ in results:  # a table compares runs of one data set
            which = tuple(getattr(point.config.dataset, key, None) for key in ("name", "path", "config"))
            folders.setdefault(which, []).append(point.folder.path)
        for of_one in folders.values():
            for part in terminal(plain(compare(of_one).as_dict(curves=False)), console.width):
                console.print(part)
        print(f"Everything lies in {results[0][0].folder.path.parent}")


def _show_search(results: Sequence[tuple[Point, dict[str, Any]]]) -> None:
    """The trials, best on validation first; the test set has no say in a search."""
    from .display import show_table
    from .report.metric import main_metric

    rows = []
    for point, result in results:
        found = (result.get("metrics") or {}).get("val") or {}
        metric = main_metric(found)
        rows.append({"settings": point.label, "validation": metric.show(found[metric.key]) if metric else None, "status": result["status"],
                     "run": point.folder.path.name})  # fmt: skip
    if rows:
        show_table(rows)
        print(f"Everything lies in {results[0][0].folder.path.parent}")


def _show_forecast(told: dict[str, Any], as_json: bool) -> None:
    from .display import show_tree
    from .report.metric import show_bytes
    from .sweep.status import show_seconds

    if as_json:
        show_tree(told, as_json)
        return
    faults = {row["fault"]: row["settings"] for row in told["runs"] if row["fault"]}
    fits = {True: "fits", False: "does not fit", None: "?"}
    rows = []
    for row in told["runs"]:
        used = "?" if row["memory_bytes"] is None else f"{show_bytes(row['memory_bytes'])}, {fits[row['fits']]}"
        costs = {"time": show_seconds(row["seconds"]), "memory": used} if not row["would"].startswith("be ") else {"time": "", "memory": ""}
        rows.append({key: "?" if row[key] is None else row[key] for key in ("run", "settings", "seed", "would")} | costs)
    total = {key: value for key, value in told["total"].items() if value is not None} | {"seconds": show_seconds(told["total"]["seconds"])}
    show_tree({"folder": told["folder"], "runs": rows, "total": total}, as_json)
    if any(row["run"] is None for row in told["runs"]):
        print("Runs named ? take the value that their trials choose; which of them are finished is known when the trials are.", file=sys.stderr)
    for fault, settings in faults.items():
        print(f"Warning: {settings} could not be measured: {fault}", file=sys.stderr)
