"""The lab bench for sparse and parameter-efficient fine-tuning.

``attach``, ``train``, ``load`` and ``runs`` are in ``finetune.api``, imported when one is first used. They
raise ``ConfigError`` for a mistake of the caller, and ``RunFailed`` for a run that failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError as ConfigError
from .errors import RunFailed as RunFailed
from .system.version import __version__ as __version__

if TYPE_CHECKING:
    from .api import attach as attach
    from .api import load as load
    from .api import runs as runs
    from .api import train as train

__all__ = ["ConfigError", "RunFailed", "attach", "load", "runs", "train"]


def __getattr__(name: str) -> Any:
    """Import a function of ``finetune.api`` when it is first used: ``import finetune`` must stay quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
