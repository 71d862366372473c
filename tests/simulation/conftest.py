"""Worlds with a clock of their own."""

import pytest


@pytest.fixture(autouse=True)
def patience() -> None:
    """Leave all limits as they are: here no machine is ever too busy."""
