"""The commands on finished runs: ``eval``, ``merge``, ``export``, ``inspect``, ``compose``, ``verify`` ..."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..config.words import OUT, sort_words
from ..errors import ConfigError
from .display import show_table, show_tree
from .options import Dense, Plugins, load_plugins

if TYPE_CHECKING:
    from ..core.analysis import Plot

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="ckpt=RUN and the command's other words, as in the example.",
        show_default=False,
    ),
]
ConfigDir = Annotated[
    Path | None, typer.Option("--config-dir", metavar="DIR", help="Your own YAML groups, as for train.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Checkpoint = Annotated[
    Path | None, typer.Option("--ckpt", metavar="PATH", help="The run folder; the same as ckpt=PATH.")
]


def evaluate(
    overrides: Overrides = None,
    ckpt: Checkpoint = None,
    config_dir: ConfigDir = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run again from its stored change: ckpt=RUN, on another data set with dataset=..."""
    load_plugins(plugins)
    run_path, rest, faults = _find_run(overrides or [], ckpt)
    for text in rest:
        if not text.startswith(("dataset=", "dataset.")):
            faults.append(
                f"{text}: eval takes ckpt=RUN and settings of the data set. "
                "All other settings are those of the run. Leave it out."
            )
    if faults or not run_path:
        raise ConfigError(*faults)
    dataset = _load_dataset(rest, run_path, config_dir) if rest else None
    from ..artifacts import reopen

    show_tree(reopen.evaluate(run_path, dataset), as_json)


def merge(
    overrides: Overrides = None,
    ckpt: Checkpoint = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] | None,
        typer.Option(help="What to round the weights to; by default, model.dtype.", show_default=False),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The largest accepted difference of logits between merged and unmerged; by default, "
            "what the dtype allows.",
            show_default=False,
        ),
    ] = None,
    unmerge: Annotated[
        bool, typer.Option("--unmerge", help="ckpt is a merged folder: write its base, to the bit, to out.")
    ] = False,
    dense: Dense = False,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Write base and change as one plain Hugging Face folder, and check it on test data: ckpt=RUN out=DIR."""
    load_plugins(plugins)
    path, given = _parse_words("merge", overrides or [], ckpt, {"out": OUT})
    out = Path(given["out"])
    if unmerge:
        _refuse_with_unmerge({"--dtype": dtype, "--tolerance": tolerance, "--dense": dense or None})
        from ..artifacts.unmerge import unmerge as unmerge_folder

        show_tree(unmerge_folder(path, out), as_json)
        return
    from ..artifacts.merge import ABOUT, PRECISION
    from ..artifacts.merge import merge as merge_run

    report = merge_run(path, out, PRECISION.get(dtype or "", dtype), tolerance, dense)
    if not as_json:
        report["layers"] = f"{len(report['layers'])}, each in {out / ABOUT}"
    show_tree(report, as_json)


def _refuse_with_unmerge(options: Mapping[str, object]) -> None:
    """Raise ``ConfigError`` for options of merge that have a value."""
    faults = []
    for name, value in options.items():
        if value is not None:
            faults.append(
                f"{name}={value} has no effect with merge --unmerge, which restores the base to the bit. "
                "Leave it out."
            )
    if faults:
        raise ConfigError(*faults)


def export(
    overrides: Overrides = None, ckpt: Checkpoint = None, plugins: Plugins = None, as_json: AsJson = False
) -> None:
    """Write the change in another library's format: ckpt=RUN format=peft out=DIR."""
    load_plugins(plugins)
    path, given = _parse_words("export", overrides or [], ckpt, {"format": "format=peft", "out": OUT})
    from ..artifacts.export import export as export_run

    show_tree(export_run(path, given["format"], Path(given["out"])), as_json)


def verify(
    overrides: Overrides = None, ckpt: Checkpoint = None, plugins: Plugins = None, as_json: AsJson = False
) -> None:
    """Test a run: its files, a resume from its middle, its numbers and its merge (exit 1 if one fails)."""
    load_plugins(plugins)
    path, _ = _parse_words("verify", [_complete_word(word) for word in overrides or []], ckpt, {})
    from ..artifacts.verify import verify as verify_run

    found = verify_run(path, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for point in found["points"]:
            print(f"{point['verdict']:<8}{point['point']:<12}{point['words']}")
    if found["verdict"] != "pass":
        raise typer.Exit(1)


def _complete_word(word: str) -> str:
    """Return ``ckpt=RUN`` for a bare ``RUN``."""
    return word if word.startswith(("ckpt=", "-")) else f"ckpt={word}"


def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="The run folder, or ckpt=RUN.", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="How many singular directions count as principal.")] = 32,
    alpha: Annotated[
        float,
        typer.Option(
            min=0.001, max=0.999, help="The share of the entries that the principal and the low mask have."
        ),
    ] = 0.5,
    gradient: Annotated[
        int,
        typer.Option(min=0, help="Also compare with the largest gradients of N training batches."),
    ] = 0,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run changed: how much, in which roles, depths and directions. Plots go to RUN/inspect/."""
    load_plugins(plugins)
    from rich.console import Console

    from ..report.inspection import InspectionTable, summarise

    run_path, _ = _parse_words("inspect", [_complete_word(word) for word in words or []], None, {})
    from ..artifacts.analyze import inspect as inspect_run
    from ..registry import get

    geometry = get("analysis", "geometry")(rank=rank, alpha=alpha, gradient=gradient)
    result, table = inspect_run(geometry, run_path)
    plots = _draw(table.plots, Path(result["folder"]))
    if as_json:
        print(json.dumps({**result, "plots": plots}, indent=2))
        return
    if result["total"]:
        Console().print(InspectionTable(result))
    print(*summarise(result), *plots, sep="\n")


def _draw(plots: Sequence[Plot], folder: Path) -> list[str]:
    """Draw plots into ``folder`` and return the files; warn if they cannot be written."""
    from ..report.drawing import draw_plots

    try:
        return list(map(str, draw_plots(plots, folder)))
    except OSError as error:
        print(f"Warning: no plots were written to {folder}: {error.strerror}.", file=sys.stderr)
        return []


def analyze(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="what=NAME RUN [RUN2]",
            help="The analysis, its options as OPTION=VALUE or what.OPTION=VALUE, and the runs.",
            show_default=False,
        ),
    ] = None,
    config_dir: ConfigDir = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Analyze a run, or two together: what=NAME RUN. The result goes to RUN/analysis/NAME.json."""
    load_plugins(plugins)
    settings: list[str] = []
    runs: list[Path] = []
    for word in words or []:
        if _names_run(word):
            runs.append(Path(word.removeprefix("ckpt=")))
        else:
            settings.append(word)
    from ..artifacts.analyze import analyze as analyze_runs
    from ..artifacts.analyze import find_run_faults
    from ..config.named import read_named

    try:
        analysis = read_named("analysis", "what", settings, config_dir)
    except ConfigError as error:
        raise ConfigError(*error.faults, *find_run_faults(runs)) from None
    analyzed = analyze_runs(analysis, runs)
    try:
        files = [str(analyzed.store())]
    except OSError as error:
        print(f"Warning: nothing was written to {analyzed.folder}: {error.strerror}.", file=sys.stderr)
        files = []
    if analyzed.table.plots:
        files += _draw(analyzed.table.plots, analyzed.folder / analyzed.name)
    if as_json:
        print(json.dumps({**analyzed.result, "files": files}, indent=2))
        return
    if analyzed.table.rows:
        show_table(analyzed.table.rows)
    show_tree(analyzed.table.summary, as_json=False)
    print(*analyzed.table.notes, *files, sep="\n")


def compose(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN... out=DIR",
            help="The runs; weights=1,0.5 and head=RUN if wanted.",
            show_default=False,
        ),
    ] = None,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Add the sparse changes of runs on one base. The head is that of the last run, or of head=RUN."""
    load_plugins(plugins)
    found = sort_words("compose", words or [], {"out": OUT}, ("weights", "head"))
    given, runs, faults = found.given, list[Path](), list(found.faults)
    for word in found.rest:
        if _names_run(word):
            runs.append(Path(word.removeprefix("ckpt=")))
        else:
            faults.append(f"{word} is neither a run folder nor out=DIR, weights=1,0.5 or head=RUN.")
    weights = None
    if given.get("weights"):
        try:
            weights = [float(number) for number in given["weights"].split(",")]
        except ValueError:
            faults.append(f"weights={given['weights']} is not a list of numbers, such as weights=1,0.5.")
    from ..artifacts.compose import compose as compose_runs
    from ..artifacts.compose import find_faults

    head = Path(given["head"]) if given.get("head") else None
    if faults:
        out = Path(given["out"]) if given.get("out") else None
        raise ConfigError(*faults, *find_faults(runs, out, weights, head))
    report = compose_runs(runs, Path(given["out"]), weights, head)
    if not as_json:
        report["layers"] = f"{len(report['layers'])}, each in {Path(given['out']) / 'compose.json'}"
    show_tree(report, as_json)


def _names_run(word: str) -> bool:
    """Tell whether a word is the path of a run, with or without ``ckpt=``, and not a setting."""
    key, sign, _ = word.partition("=")
    if word.startswith("-"):
        return False
    return not sign or key == "ckpt" or "/" in key or Path(word).exists()


def _parse_words(
    command: str, words: list[str], ckpt: Path | None, needed: Mapping[str, str]
) -> tuple[Path, dict[str, str]]:
    """Return the run and the value of each key of ``needed``, which says in words what each is.

    Raises ``ConfigError`` unless the run and every key are given exactly once, and nothing else.
    """
    path, rest, faults = _find_run(words, ckpt)
    found = sort_words(command, rest, needed)
    usage = " ".join(["ckpt=RUN", *(text.partition(",")[0] for text in needed.values())])
    for word in found.rest:
        faults.append(f"{word}: {command} takes {usage}.")
    faults += found.faults
    if faults or not path:
        raise ConfigError(*faults)
    return path, found.given


def _find_run(words: list[str], ckpt: Path | None) -> tuple[Path | None, list[str], list[str]]:
    """Return the one run that is named, the other words, and what is wrong with the run.

    The path is not parsed as an override, because Hydra's grammar would refuse ``epoch=3.pt``.
    """
    given, rest = [], []
    for word in words:
        if word.startswith("ckpt="):
            given.append(word.removeprefix("ckpt="))
        else:
            rest.append(word)
    if ckpt:
        given.append(str(ckpt))
    if len(given) != 1:
        count = f", not {len(given)}" if given else ""
        fault = f"Name one run by ckpt=RUN or --ckpt PATH{count}; for example ckpt=outputs/NAME/RUN."
        return None, rest, [fault]
    if not given[0] or not Path(given[0]).exists():
        fault = f"ckpt={given[0]}: there is no such folder. Give a run folder, outputs/NAME/RUN."
        return None, rest, [fault]
    return Path(given[0]), rest, []


def _load_dataset(overrides: list[str], run_path: Path, config_dir: Path | None) -> Any:
    """Return the data set that ``overrides`` choose, or the run's own with changed values."""
    from ..config.load import load

    if any(text.startswith("dataset=") for text in overrides):
        return load(overrides, config_dir).dataset
    frozen = run_path / "config.yaml"
    for folder in (run_path, *run_path.parents):  # a checkpoint lies below its run
        if (folder / "config.yaml").is_file():
            frozen = folder / "config.yaml"
            break
    return load(overrides, config_dir, frozen).dataset
