"""The commands that run a pass over a model's weights: ``prune``, ``fold`` and ``compress``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .display import show_tree
from .options import ConfigDir, Dense, Plugins, load_plugins

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="method=NAME, its settings as OPTION=VALUE or method.OPTION=VALUE, model=PATH out=DIR, and "
        "dataset=NAME where the method needs data, or runs=RUN1,RUN2 where it folds runs.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show which layers would change; write nothing.")]


def prune(
    words: Words = None,
    config_dir: ConfigDir = None,
    dry_run: DryRun = False,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Set weights of a model to 0 and write it as a plain folder: method=magnitude sparsity=0.5 model=PATH.

    If it is stopped, the same command goes on.
    """
    _run_pass("prune", words or [], config_dir, dry_run, plugins, as_json)


def fold(
    words: Words = None,
    config_dir: ConfigDir = None,
    dry_run: DryRun = False,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Add what runs of one base changed, by weights: method=linear model=BASE runs=RUN1,RUN2 out=DIR.

    The result is a plain folder. If the command is stopped, the same command goes on.
    """
    _run_pass("fold", words or [], config_dir, dry_run, plugins, as_json)


def compress(
    words: Words = None,
    config_dir: ConfigDir = None,
    dry_run: DryRun = False,
    dense: Dense = False,
    plugins: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Store layers of a model as smaller tensors: method=svd keep=0.8 model=PATH out=FOLDER.

    If it is stopped, the same command goes on.
    """
    _run_pass("compress", words or [], config_dir, dry_run, plugins, as_json, dense)


def _run_pass(
    verb: str,
    words: list[str],
    config_dir: ConfigDir,
    dry_run: bool,
    plugins: Plugins,
    as_json: bool,
    dense: bool = False,
) -> None:
    """Run the pass that the words name, and show what was done."""
    load_plugins(plugins)
    from ..config.passes import read_words

    given = read_words(verb, words, config_dir)
    from ..artifacts import pass_subject, passes

    if given.faults:
        raise ConfigError(*dict.fromkeys([*given.faults, *pass_subject.find_faults(given)]))
    out = Path(given.out)
    request = pass_subject.Request(
        given.method,
        given.model,
        out,
        given.dataset,
        runs=given.runs,
        head=given.head,
        dense=dense,
        **given.numbers,
    )
    if dry_run:
        show_tree(passes.plan(request), as_json)
        return
    result = passes.run(request, lambda line: print(line, file=sys.stderr))
    if not as_json:
        result["sites"] = f"{len(result['sites'])}, each in {out / pass_subject.FOLDER / pass_subject.ABOUT}"
    show_tree(result, as_json)
