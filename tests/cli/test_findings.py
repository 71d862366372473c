"""What is made of answers: what counts as accepted, and from which moment on."""

import pytest

from tfm_guard.cli.connection import Answer
from tfm_guard.cli.findings import (
    REFUSALS,
    Deletion,
    Findings,
    Outcome,
    Sample,
    Verdict,
    find,
    judge,
    outcome_of,
)

SENT, RETURNED = 10.0, 12.0
DELETED = Deletion(SENT, ("204",), RETURNED)


def at(started: float, outcome: Outcome, *, managing: bool = False) -> Sample:
    """Return a request that began then and took half a second."""
    return Sample(started, started + 0.5, managing, outcome, "503 unavailable")


REFUSED_AFTER = [at(12.5, Outcome.REFUSED)] * REFUSALS


def found(*samples: Sample) -> Findings:
    """Return what one connection shows that refused well afterwards, besides *samples*."""
    return find("http://a", 1, [[*samples, *REFUSED_AFTER]], DELETED)


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        (200, "", Outcome.ACCEPTED),
        (302, "", Outcome.ACCEPTED),
        (403, "insufficient_scope", Outcome.ACCEPTED),
        (404, "not_found", Outcome.ACCEPTED),
        (401, "invalid_token", Outcome.REFUSED),
        (401, "missing_credentials", Outcome.UNCLEAR),
        (401, "", Outcome.UNCLEAR),
        (429, "", Outcome.UNCLEAR),
        (500, "", Outcome.UNCLEAR),
        (503, "unavailable", Outcome.UNCLEAR),
    ],
)
def test_what_an_answer_says_about_the_key(status: int, code: str, outcome: Outcome) -> None:
    """Only 401 invalid_token refuses; what may come from before the check of the key is unclear."""
    assert outcome_of(Answer(0, 0, status, code, "", "", b"")) is outcome


def test_the_start_decides_what_is_after() -> None:
    """A request that had begun when DELETE returned may be accepted, however late it ends."""
    during = found(at(RETURNED - 0.1, Outcome.ACCEPTED), at(RETURNED, Outcome.ACCEPTED))
    assert (during.accepted_before, during.accepted_after) == (2, 0)
    assert during.last_accepted_seconds == RETURNED - SENT
    assert judge([during], DELETED) == (Verdict.HELD, [])
    after = found(at(RETURNED + 0.001, Outcome.ACCEPTED))
    assert (after.accepted_before, after.accepted_after) == (0, 1)
    assert judge([after], DELETED)[0] is Verdict.BROKEN


def test_a_refusal_before_the_deletion_is_one_too_early() -> None:
    """What was refused before DELETE was sent was valid; a refusal while it ran is the first."""
    early = found(at(SENT - 0.75, Outcome.REFUSED))
    assert (early.refused_too_early, early.first_refused_seconds) == (1, 3.0)
    assert judge([early], DELETED)[0] is Verdict.BROKEN
    during = found(at(SENT - 0.25, Outcome.REFUSED))
    assert (during.refused_too_early, during.first_refused_seconds) == (0, 0.25)
    assert judge([during], DELETED)[0] is Verdict.HELD


def test_an_unclear_answer_matters_only_afterwards() -> None:
    """Unclear answers before the return are listed; one after it leaves the proof incomplete."""
    before = found(at(SENT, Outcome.UNCLEAR), at(13, Outcome.UNCLEAR, managing=True))
    assert before.unclear_before == before.managing_unclear == {"503 unavailable": 1}
    assert judge([before], DELETED)[0] is Verdict.HELD
    after = found(at(RETURNED + 1, Outcome.UNCLEAR))
    assert judge([after], DELETED)[0] is Verdict.NOT_SHOWN


def test_each_connection_must_have_refused_often() -> None:
    """One connection with too few refusals is enough for the proof to be incomplete."""
    few = find("http://a", 2, [REFUSED_AFTER, REFUSED_AFTER[1:]], DELETED)
    assert few.fewest_refused_after == REFUSALS - 1
    assert judge([few], DELETED)[0] is Verdict.NOT_SHOWN


def test_without_a_return_nothing_is_after() -> None:
    """Where DELETE was never confirmed, no answer counts against the deployment."""
    unconfirmed = Deletion(SENT, ("503 unconfirmed",), None)
    one = find("http://a", 1, [[at(99, Outcome.ACCEPTED)]], unconfirmed)
    assert (one.accepted_before, one.accepted_after) == (1, 0)
    assert judge([one], unconfirmed) == (
        Verdict.NOT_SHOWN,
        ["DELETE was sent once and never confirmed; answered: 503 unconfirmed"],
    )
