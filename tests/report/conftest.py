"""Fixtures of the tests of reports."""

from ..support.run_folders import make_run as make_run
