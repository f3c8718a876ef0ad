"""Fixtures of this folder."""

from __future__ import annotations

from ..sweep.conftest import typed as typed
