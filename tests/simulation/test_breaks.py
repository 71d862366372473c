"""Every rule matters: without it something fails. `make breaks` shows it of each, this of many."""

import pytest

from tests.simulation.all_breaks import fault_of
from tests.simulation.breaks import BREAKS, DIRECTED, RARE

# One for each file and kind of test among the quick ones.
TELLING = (
    "a gap in the feed is passed over",
    "a change made here is not applied here",
    "revoking waits from the commit, not from telling",
)


@pytest.mark.parametrize("name", [name for name in BREAKS if name not in RARE])
def test_is_noticed(name: str) -> None:
    """With one rule broken, some invariant fails in the simulation."""
    assert fault_of(name, steps=400_000) == ""


@pytest.mark.parametrize("name", TELLING)
def test_has_a_test_of_its_own(name: str) -> None:
    """With one rule broken that the simulation does not need, the test named for it fails."""
    assert fault_of(name, steps=0) == ""


def test_each_rule_has_one_place() -> None:
    """No rule is listed twice, and what is called rare is searched for at all."""
    assert not BREAKS.keys() & DIRECTED.keys()
    assert BREAKS.keys() > RARE
