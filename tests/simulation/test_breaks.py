"""Every rule matters: without it, the simulation finds an invariant that does not hold."""

import pytest

from tests.simulation.breaks import BREAKS
from tests.simulation.campaign import Campaign


@pytest.mark.parametrize("name", BREAKS)
def test_is_noticed(name: str) -> None:
    """With one rule broken, an invariant that guards it fails within the steps allowed for it."""
    rule = BREAKS[name]
    campaign = Campaign(first_seed=1, focus=rule.focus)
    undo = rule.apply()
    try:
        campaign.run(steps=rule.steps)
    finally:
        undo()
    assert campaign.failures
    assert campaign.failures[0].invariant in rule.invariants
