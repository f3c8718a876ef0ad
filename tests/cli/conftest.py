"""Fixtures of this folder."""

from __future__ import annotations

from ..support.run_folders import make_run as make_run
from ..sweep.conftest import typed as typed
