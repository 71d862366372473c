"""Changes of the same keys at the same time are as if made one after the other."""

import pytest

from tests.flows.interleavings import Act, Interleavings, Round, State

BOTH = frozenset({"send", "domains:read"})


async def test_every_outcome_is_a_serial_one(database_url: str) -> None:
    """In 48 rounds by three guards results and keys are those of some order, each change fed once.

    So a key has one successor at most, and an account no more keys than its plan allows.
    """
    search = Interleavings(database_url, seed=1)
    await search.run(rounds=48, at_once=24)
    assert search.faults == []
    met = {"rotate: done", "rotate: AlreadyReplaced", "rotate: KeyNotFound", "narrow: KeyNotFound"}
    met |= {"narrow: done", "narrow: InvalidInput", "create: PlanLimitReached", "create: done"}
    assert met - set(search.counts) == set()


@pytest.mark.parametrize(
    ("acts", "results", "after"),
    [
        # Two successors of one key.
        (
            [Act("rotate"), Act("rotate")],
            ["done", "done"],
            {0: State(BOTH, replaced_by=("act", 1)), ("act", 0): State(BOTH)},
        ),
        # A successor that has what was taken from the key before, or nothing of both.
        (
            [Act("rotate"), Act("narrow", kept=frozenset({"send"}))],
            ["done", "done"],
            {0: State(BOTH, replaced_by=("act", 0)), ("act", 0): State(BOTH)},
        ),
        # A key that is revoked, and rotated after that.
        (
            [Act("revoke"), Act("rotate")],
            ["done", "done"],
            {0: State(BOTH, revoked=True), ("act", 1): State(BOTH)},
        ),
    ],
)
def test_other_outcomes_are_told(
    acts: list[Act], results: list[str], after: dict[object, State]
) -> None:
    """What no order of the changes explains is found to be so."""
    assert not Round({0: State(BOTH)}, acts, results, after).is_serial()
