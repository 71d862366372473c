"""A plugin of pytest that takes a rule out of the code before any test runs; see `Directed`."""

import os

import pytest

from tests.simulation.breaks import DIRECTED


def pytest_configure(config: pytest.Config) -> None:
    """Break the rule that the environment names, for as long as this process lasts."""
    DIRECTED[os.environ["TFM_GUARD_TEST_BREAK"]].breaks()
