"""Facts about all that takes something away: it returns when no process acts on what was before.

Each guard is a process of its own. With a lease of 2 s it takes at most 3 s until a process that
hears of nothing trusts its memory no more.
"""

import contextlib
import math
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from tests.support.guards import (
    begin_waiting,
    cost_of,
    create,
    freshness_of,
    linked_guard,
    local_of,
    new_guard,
    prepare,
    shared_of,
    until,
    written,
)
from tests.support.redis import RedisServer
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.confirmation import CONFIRM_SECONDS
from tfm_guard.errors import AlreadyReplaced, InvalidToken, NotConfirmed
from tfm_guard.records import CreatedKey, RotatedKey
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock

POLL, LONGEST_WAIT = 0.25, 3.0  # seconds
HIDE = "ALTER TABLE tfm_workers RENAME TO out_of_sight"
SHOW = "ALTER TABLE out_of_sight RENAME TO tfm_workers"

Taking = Callable[[Guard, CreatedKey], Coroutine[Any, Any, Any]]


def narrow(guard: Guard, created: CreatedKey) -> Coroutine[Any, Any, Any]:
    """Leave the key nothing but `send`."""
    return guard.keys.change("acme", created.key.id, scopes=["send"])


def rotate(guard: Guard, created: CreatedKey) -> Coroutine[Any, Any, Any]:
    """Replace the key at once."""
    return guard.keys.rotate("acme", created.key.id, grace=timedelta())


def suspend(guard: Guard, created: CreatedKey) -> Coroutine[Any, Any, Any]:
    """Suspend the key's account."""
    return guard.accounts.suspend("acme")


def erase(guard: Guard, created: CreatedKey) -> Coroutine[Any, Any, Any]:
    """Erase the key's account."""
    return guard.accounts.erase("acme")


each_taking = pytest.mark.parametrize("take", [narrow, rotate, suspend, erase])


async def create_wide(guard: Guard) -> CreatedKey:
    """Create a key that has something to lose."""
    return await create(guard, scopes=["send", "domains:read"])


def acts_as_before(guard: Guard, created: CreatedKey) -> bool:
    """Tell whether the guard would, from memory, let the key do all that it could."""
    key = guard.recall(as_headers(created.token.encode()))
    return key is not None and key.scopes == created.key.scopes


async def is_over(guard: Guard, created: CreatedKey, take: Taking) -> bool:
    """Tell whether the guard has the key as it is now, asked about it."""
    try:
        key = await guard.verify(created.token)
    except InvalidToken:
        return take is not narrow
    return take is narrow and key.scopes == {"send"}


async def has_seen_all(url: str, guard: Guard) -> None:
    """Return once the register says that *guard* has come to the head of the feed."""
    workers = schema.workers.c
    seen = select(workers.seen).where(workers.id == freshness_of(guard).worker_id)

    def has_seen() -> bool:
        return execute(url, seen) == execute(url, select(schema.feed.c.head))

    await until(has_seen, what="the head of the feed")


@each_taking
async def test_who_hears_of_nothing_is_waited_for(database_url: str, take: Taking) -> None:
    """It does not return before one that is cut off trusts its memory no more."""
    clock, still = ManualClock(), ManualClock()
    async with (
        new_guard(database_url, clock=clock) as guard,
        new_guard(database_url, clock=still) as other,
    ):
        created = await create_wide(guard)
        await still.pass_time(POLL)
        await other.verify(created.token)
        call = await begin_waiting(clock, take(guard, created))
        assert not acts_as_before(guard, created)
        await clock.pass_time(LONGEST_WAIT - 0.01)
        assert not call.done()
        assert acts_as_before(other, created)
        still.advance(2.0)  # what a lease lasts
        assert not acts_as_before(other, created)
        await clock.pass_time(0.02)
        await call
        assert await is_over(other, created, take)
        assert await is_over(guard, created, take)


@each_taking
async def test_who_has_read_of_it_is_not_waited_for(database_url: str, take: Taking) -> None:
    """It returns when the other has read the feed, and so acts on the key as it is now."""
    clock, other_clock = ManualClock(), ManualClock()
    async with (
        new_guard(database_url, clock=clock) as guard,
        new_guard(database_url, clock=other_clock) as other,
    ):
        created = await create_wide(guard)
        await other_clock.pass_time(POLL)
        await other.verify(created.token)
        call = await begin_waiting(clock, take(guard, created))
        await clock.pass_time(1)
        assert not call.done()
        assert acts_as_before(other, created)
        await other_clock.pass_time(POLL)
        assert not acts_as_before(other, created)
        await has_seen_all(database_url, other)
        await clock.pass_time(0.06)
        await call
        assert await is_over(other, created, take)


@pytest.mark.parametrize("take", [narrow, suspend, erase])
async def test_what_cannot_be_shown_is_not_confirmed(database_url: str, take: Taking) -> None:
    """Where nobody can tell who caches, it says so after 5 s; the same again joins the wait."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create_wide(guard)
        execute(database_url, HIDE)
        call = await begin_waiting(clock, take(guard, created))
        await clock.pass_time(CONFIRM_SECONDS)
        with pytest.raises(NotConfirmed):
            await call
        assert await is_over(guard, created, take)
        call = await begin_waiting(clock, take(guard, created))
        await clock.pass_time(1)
        assert not call.done()
        execute(database_url, SHOW)
        await clock.pass_time(0.06)
        await call
    feed = execute(database_url, select(schema.changes.c.kind).order_by("id"))
    assert len(feed) == 2


async def test_a_token_is_not_lost_where_the_end_cannot_be_shown(database_url: str) -> None:
    """Rotating returns the new token all the same, and says that the old key's end is not sure."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create_wide(guard)
        execute(database_url, HIDE)
        call = await begin_waiting(clock, guard.keys.rotate("acme", created.key.id))
        await clock.pass_time(CONFIRM_SECONDS)
        rotated: RotatedKey = await call
        assert rotated.confirmed is None
        assert (await guard.verify(rotated.token)).key_id == rotated.key.id
        with pytest.raises(AlreadyReplaced):
            await guard.keys.rotate("acme", created.key.id)
        execute(database_url, SHOW)


async def test_suspending_waits_for_what_was_revoked_before(database_url: str) -> None:
    """A key whose revocation not all know of is refused everywhere when suspending returns."""
    clock, still = ManualClock(), ManualClock()
    async with (
        new_guard(database_url, clock=clock) as guard,
        new_guard(database_url, clock=still) as other,
    ):
        created = await create_wide(guard)
        await still.pass_time(POLL)
        await other.verify(created.token)
        revoking = await begin_waiting(clock, guard.keys.revoke("acme", created.key.id))
        call = await begin_waiting(clock, guard.accounts.suspend("acme"))
        await clock.pass_time(1)
        assert not call.done()
        assert acts_as_before(other, created)
        await still.pass_time(POLL)
        await has_seen_all(database_url, other)
        await clock.pass_time(0.06)
        await call
        assert not acts_as_before(other, created)
        await revoking


@each_taking
async def test_over_the_link_all_know_at_once(
    database_url: str, redis_server: RedisServer, take: Taking
) -> None:
    """Nobody reads the feed, and yet all act on the key as it is, whatever Redis still holds."""
    await prepare(database_url)
    async with (
        linked_guard(database_url, redis_server.url) as guard,
        linked_guard(database_url, redis_server.url) as other,
        linked_guard(database_url, redis_server.url) as third,
    ):
        created = await create_wide(guard)
        await other.verify(created.token)
        await written(shared_of(other))
        assert (await cost_of(third, third.verify(created.token))).database == 0
        local_of(third).clear()
        await take(guard, created)
        assert not acts_as_before(other, created)
        # What Redis has is of before, and nobody believes it.
        rejected = third.counters.shared_rejected
        assert await is_over(third, created, take)
        assert third.counters.shared_rejected == rejected + 1
        assert await is_over(other, created, take)


async def test_what_is_left_is_shared_again(database_url: str, redis_server: RedisServer) -> None:
    """The narrowed key takes the former one's place in Redis, for those who come later."""
    await prepare(database_url)
    async with (
        linked_guard(database_url, redis_server.url) as guard,
        linked_guard(database_url, redis_server.url) as other,
    ):
        created = await create_wide(guard)
        await guard.verify(created.token)
        await written(shared_of(guard))
        await narrow(guard, created)
        await guard.verify(created.token)
        await written(shared_of(guard))

        async def look() -> None:
            assert (await other.verify(created.token)).scopes == {"send"}

        assert (await cost_of(other, look())).database == 0


async def knows_what_it_read(
    database_url: str, change: Callable[[str], None], *, remembers: bool
) -> None:
    """Have a guard without a lease read a changed key, and then have one, from a poll before that.

    It must act on what it has read.
    """
    async with new_guard(database_url, clock=ManualClock()) as guard:
        created = await create_wide(guard)
        if remembers:
            await guard.verify(created.token)
        else:
            local_of(guard).clear()
        freshness = freshness_of(guard)
        lease, freshness.fresh_until = freshness.fresh_until, -math.inf
        change(database_url)
        with contextlib.suppress(InvalidToken):
            assert (await guard.verify(created.token)).scopes == {"send"}
        freshness.fresh_until = lease
        assert not acts_as_before(guard, created)
        assert freshness.floor(created.key.key_prefix) == 2


def by_hand(what: str) -> Callable[[str], None]:
    """Return a change of a key's row that no process hears of."""

    def change(url: str) -> None:
        execute(url, f"UPDATE tfm_keys SET version = 2, {what}")  # noqa: S608  # the test's own words

    return change


async def test_who_has_read_of_an_end_knows_it(database_url: str) -> None:
    """Who found a key ended does not accept it from Redis, whose entry may be of before."""
    await knows_what_it_read(database_url, by_hand("expires_at = created_at"), remembers=False)


async def test_who_has_read_of_a_suspension_knows_it(database_url: str) -> None:
    """Who found an account suspended does not accept its key from Redis."""

    def suspend_silently(url: str) -> None:
        execute(url, "UPDATE tfm_accounts SET suspended_at = '2020-01-01 00:00:00.000000'")
        execute(url, "UPDATE tfm_keys SET version = 2")

    await knows_what_it_read(database_url, suspend_silently, remembers=False)


async def test_who_has_read_of_a_narrowing_knows_it(database_url: str) -> None:
    """Who found less than it remembers does not act on what it remembers."""
    await knows_what_it_read(database_url, by_hand("scopes = 'send'"), remembers=True)
