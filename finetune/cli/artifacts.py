"""The commands on runs that have stored their change: ``eval``, ``merge``, ``export``, ``inspect``, ``compose`` and ``verify``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import ConfigError
from .display import show_tree

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="ckpt=RUN, and what else the command takes, as in the example.",
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
    as_json: AsJson = False,
) -> None:
    """Evaluate a run again from its stored change: ckpt=RUN, on another data set with dataset=..."""
    run_path, rest = _checkpoint(overrides or [], ckpt)
    wrong = [text for text in rest if not text.startswith(("dataset=", "dataset."))]
    if wrong:
        raise ConfigError(
            *(
                f"{text}: eval takes ckpt=RUN and settings of the data set; all else is as in the run."
                for text in wrong
            )
        )
    dataset = _dataset(rest, run_path, config_dir) if rest else None
    from ..artifacts import reopen as finished

    show_tree(finished.evaluate(run_path, dataset), as_json)


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
            help="The largest accepted difference of logits between merged and unmerged; by default, what the dtype allows.",
            show_default=False,
        ),
    ] = None,
    unmerge: Annotated[
        bool, typer.Option("--unmerge", help="ckpt is a merged folder: write its base, to the bit, to out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write base and change as one plain Hugging Face folder, after comparing both on test data: ckpt=RUN out=DIR."""
    path, given = _given("merge", overrides or [], ckpt, {"out": "a folder to write"})
    out = Path(given["out"])
    if unmerge:
        options = {"--dtype": dtype, "--tolerance": tolerance}
        wrong = [name for name, value in options.items() if value is not None]
        if wrong:
            raise ConfigError(
                *(
                    f"{name}={options[name]} means nothing to merge --unmerge, which gives the base back to the bit."
                    for name in wrong
                )
            )
        from ..artifacts.unmerge import unmerge as take_out

        show_tree(take_out(path, out), as_json)
        return
    from ..artifacts.merge import ABOUT, PRECISION
    from ..artifacts.merge import merge as put_in

    told = put_in(path, out, PRECISION.get(dtype or "", dtype), tolerance)
    if not as_json:
        told["layers"] = f"{len(told['layers'])}, each in {out / ABOUT}"
    show_tree(told, as_json)


def export(overrides: Overrides = None, ckpt: Checkpoint = None, as_json: AsJson = False) -> None:
    """Write the change in another library's format: ckpt=RUN format=peft out=DIR."""
    path, given = _given("export", overrides or [], ckpt, {"format": "peft", "out": "a folder to write"})
    from ..artifacts.export import export as write

    show_tree(write(path, given["format"], Path(given["out"])), as_json)


def verify(overrides: Overrides = None, ckpt: Checkpoint = None, as_json: AsJson = False) -> None:
    """Test a run: its files, a resume from its middle, its numbers and its merge (exit 1 if one fails or the run has not finished)."""
    words = [word if word.startswith(("ckpt=", "-")) else f"ckpt={word}" for word in overrides or []]
    path, _ = _given("verify", words, ckpt, {})
    from ..artifacts.verify import verify as test

    found = test(path, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(
            *(f"{point['verdict']:<8}{point['point']:<12}{point['words']}" for point in found["points"]),
            sep="\n",
        )
    if found["verdict"] != "pass":
        raise typer.Exit(1)


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
        int, typer.Option(min=0, help="Compare with the largest gradients of so many training batches, too.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a run changed: how much, in which roles and depths, along which directions. Plots go to RUN/inspect/."""
    from rich.console import Console

    from ..report import inspection

    run_path, _ = _checkpoint(
        [word if word.startswith("ckpt=") else f"ckpt={word}" for word in words or []], None
    )
    from ..artifacts.inspect import inspect as look

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


def compose(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN... out=DIR",
            help="The runs; weights=1,0.5 and head=RUN if wanted.",
            show_default=False,
        ),
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
    from ..artifacts.compose import compose as add

    told = add(runs, Path(given["out"]), weights, Path(given["head"]) if given.get("head") else None)
    if not as_json:
        told["layers"] = f"{len(told['layers'])}, each in {Path(given['out']) / 'compose.json'}"
    show_tree(told, as_json)


def _given(
    command: str, words: list[str], ckpt: Path | None, keys: Mapping[str, str]
) -> tuple[Path, dict[str, str]]:
    """The run, and the value of each of ``keys``, all of which must be given, once."""
    path, rest = _checkpoint(words, ckpt)
    usage = " ".join(
        ["ckpt=RUN", *(f"{key}={'DIR' if key == 'out' else what}" for key, what in keys.items())]
    )
    found: dict[str, str] = {}
    faults = []
    for word in rest:
        key, _, value = word.partition("=")
        if key not in keys or not value:
            faults.append(f"{word}: {command} takes {usage}.")
        elif key in found:
            faults.append(f"{word}: {key} is given twice.")
        found[key] = value
    faults += [
        f"{command} needs one {key}={'DIR' if key == 'out' else what}{', ' + what if key == 'out' else ''}."
        for key, what in keys.items()
        if not found.get(key)
    ]
    if faults:
        raise ConfigError(*faults)
    return path, found


def _checkpoint(words: list[str], ckpt: Path | None) -> tuple[Path, list[str]]:
    """The one run that is named, and the other words. Its path is taken as typed: Hydra's grammar would refuse ``epoch=3.pt``."""
    given = [word.removeprefix("ckpt=") for word in words if word.startswith("ckpt=")] + (
        [str(ckpt)] if ckpt else []
    )
    if len(given) != 1:
        raise ConfigError(
            f"Name one run by ckpt=RUN or --ckpt PATH{f', not {len(given)}' if given else ''}; for example ckpt=outputs/NAME/RUN."
        )
    if not given[0] or not Path(given[0]).exists():
        raise ConfigError(f"ckpt={given[0]}: there is no such folder. Give a run folder, outputs/NAME/RUN.")
    return Path(given[0]), [word for word in words if not word.startswith("ckpt=")]


def _dataset(overrides: list[str], run_path: Path, config_dir: Path | None) -> Any:
    """The data set that ``overrides`` choose, or the run's own with other values."""
    from ..config.load import load

    if any(text.startswith("dataset=") for text in overrides):
        return load(overrides, config_dir).dataset
    frozen = (folder / "config.yaml" for folder in (run_path, *run_path.parents))
    return load(
        overrides, config_dir, next((file for file in frozen if file.is_file()), run_path / "config.yaml")
    ).dataset
