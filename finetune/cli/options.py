"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..launch.start import StartOptions

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
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugins",
        metavar="DIR",
        help="A folder of your own methods, data sets, objectives and so on; may be repeated.",
        show_default=False,
    ),
]
Dense = Annotated[
    bool,
    typer.Option("--dense", help="Multiply structures out: write a folder that transformers alone reads."),
]


def start_options(plugins: list[Path] | None) -> StartOptions:
    """Return the options that must hold in this process and in every process that it starts."""
    from ..launch.start import StartOptions

    return StartOptions(tuple(str(folder.absolute()) for folder in plugins or ()))


def load_plugins(plugins: list[Path] | None) -> StartOptions:
    """Load plug-ins in this process, and return the options for processes that it starts."""
    options = start_options(plugins)
    options.apply()
    return options
