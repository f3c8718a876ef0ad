"""Fixtures of this folder."""

from __future__ import annotations

from ..support.some_config import some_config as some_config
