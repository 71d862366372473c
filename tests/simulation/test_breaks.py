"""Every rule matters: without it, the simulation finds an invariant that does not hold."""

import pytest

from tests.simulation.breaks import BREAKS, FOCUS, UNNOTICED
from tests.simulation.campaign import Campaign

STEPS = 400_000


@pytest.mark.parametrize("name", BREAKS)
def test_is_noticed(name: str) -> None:
    """With one rule broken, some invariant fails within 400,000 steps."""
    campaign = Campaign(first_seed=1, focus=FOCUS.get(name, ()))
    undo = BREAKS[name]()
    try:
        campaign.run(steps=STEPS)
    finally:
        undo()
    assert campaign.failures


@pytest.mark.parametrize("name", UNNOTICED)
def test_is_still_there(name: str) -> None:
    """The code still has each rule whose absence has not been noticed, so it can be looked into."""
    UNNOTICED[name]()()
