"""Prepare the fork server (see ``forkserver``): bind it to the sweep, then import what most runs need.

Only the fork server imports this module.
"""

from __future__ import annotations

import os
import signal

from ..registry import import_all
from .forkserver import SIGNALS
from .start import end_with


def _bind_to_sweep() -> None:
    """End the server with the sweep, and ignore signals: the sweep handles a signal and ends its runs."""
    end_with(os.getppid())
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # ``forkserver`` blocked them before the start


def _import_modules() -> None:
    """Import what takes seconds: libraries first, then this package and everything that it registers.

    The imported names are not used here (F401); the imports make the modules ready for every forked run.
    """
    import datasets  # noqa: F401
    import pydantic.type_adapter  # noqa: F401
    from transformers.models.vit import image_processing_pil_vit, modeling_vit  # noqa: F401

    from ..training import run  # noqa: F401
    from . import ranks  # noqa: F401

    import_all()


_bind_to_sweep()  # before the imports, during which a signal may arrive
_import_modules()
