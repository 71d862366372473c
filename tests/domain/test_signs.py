"""Facts about the status of a key."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfm_guard.records import ApiKey
from tfm_guard.signs import status_of

NOW = datetime(2030, 1, 1, tzinfo=UTC)
TICK = timedelta(microseconds=1)
DAY = timedelta(days=1)

moments = st.datetimes(datetime(2029, 1, 1), datetime(2031, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  # hypothesis adds the zone
past = moments.filter(lambda moment: moment <= NOW)


def key(
    *,
    created: timedelta = DAY,
    used: timedelta | None = timedelta(0),
    left: timedelta | None = None,
    replaced: bool = False,
) -> ApiKey:
    """Return a key of some age, used some time ago, with some time left."""
    return ApiKey(
        id=UUID(int=1),
        key_prefix="00000001",
        account_id="acme",
        name="CI",
        scopes=frozenset(),
        created_at=NOW - created,
        last_used_at=None if used is None else NOW - used,
        expires_at=None if left is None else NOW + left,
        replaced_by=UUID(int=2) if replaced else None,
    )


@pytest.mark.parametrize(
    ("which", "status"),
    [
        (key(), "ok"),
        (key(used=None), "never_used"),
        (key(created=90 * DAY - TICK, used=None), "never_used"),
        (key(created=90 * DAY, used=None), "idle"),
        (key(created=400 * DAY, used=90 * DAY - TICK), "ok"),
        (key(created=400 * DAY, used=90 * DAY), "idle"),
        (key(created=DAY, used=90 * DAY), "ok"),
        (key(left=14 * DAY + TICK), "ok"),
        (key(left=14 * DAY), "expiring"),
        (key(left=TICK), "expiring"),
        (key(created=400 * DAY, used=100 * DAY, left=DAY), "expiring"),
        (key(used=None, left=DAY), "expiring"),
        (key(replaced=True), "replaced"),
        (key(created=400 * DAY, used=None, left=DAY, replaced=True), "replaced"),
    ],
)
def test_each_status_has_its_bounds(which: ApiKey, status: str) -> None:
    """A key is expiring from 14 days on, idle from 90; the more pressing comes first."""
    assert status_of(which, NOW) == status


@given(past, st.none() | past, st.none() | moments, st.none() | st.uuids())
def test_a_status_says_what_is_so(
    created: datetime, used: datetime | None, expires: datetime | None, successor: UUID | None
) -> None:
    """Whatever the key's times are, its status follows from them, and "ok" means none other."""
    which = ApiKey(
        id=UUID(int=1),
        key_prefix="00000001",
        account_id="acme",
        name="CI",
        scopes=frozenset(),
        created_at=created,
        last_used_at=used,
        expires_at=expires,
        replaced_by=successor,
    )
    expiring = expires is not None and expires <= NOW + 14 * DAY
    idle = created <= NOW - 90 * DAY and (used is None or used <= NOW - 90 * DAY)
    facts = {
        "replaced": successor is not None,
        "expiring": expiring,
        "idle": idle,
        "never_used": used is None,
    }
    assert status_of(which, NOW) == next((name for name, so in facts.items() if so), "ok")


@given(past, st.none() | past, st.none() | moments, moments.filter(lambda moment: moment > NOW))
def test_an_unused_key_only_gets_worse(
    created: datetime, used: datetime | None, expires: datetime | None, later: datetime
) -> None:
    """As time goes by without use, a key never comes back to a less pressing status."""
    order = ["ok", "never_used", "idle", "expiring"]
    which = ApiKey(
        id=UUID(int=1),
        key_prefix="00000001",
        account_id="acme",
        name="CI",
        scopes=frozenset(),
        created_at=created,
        last_used_at=used,
        expires_at=expires,
        replaced_by=None,
    )
    assert order.index(status_of(which, later)) >= order.index(status_of(which, NOW))
