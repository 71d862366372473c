"""Facts about revoking among several processes, on both databases: when it returns, and why.

Each guard here is a process of its own: it has its own clock, its own memory, and its own place in
the register. The lease is 2 s, so revoking takes at most 3; guards read the feed every 0.25 s.
"""

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, select

from tests.support.guards import (
    begin_waiting,
    create,
    freshness_of,
    local_of,
    new_guard,
    refusal,
    store_of,
    until,
)
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.confirmation import CONFIRM_SECONDS
from tfm_guard.errors import KeyNotFound, NotConfirmed
from tfm_guard.records import CreatedKey, Revocation
from tfm_guard.store import MARKED, Register, schema
from tfm_guard.testing import ManualClock

POLL, LONGEST_WAIT, UNFED_WAIT = 0.25, 3.0, 61.0  # seconds
HIDE = "ALTER TABLE tfm_workers RENAME TO out_of_sight"
SHOW = "ALTER TABLE out_of_sight RENAME TO tfm_workers"

keys = schema.keys


def register_of(url: str) -> dict[UUID, int]:
    """Return who is in the register, and up to where each has seen the feed."""
    workers = schema.workers.c
    return {row.id: row.seen for row in execute(url, select(workers.id, workers.seen))}


def enter_dead_process(url: str) -> UUID:
    """Put a process into the register that will never read the feed."""
    worker_id = uuid4()
    row = {
        "id": worker_id,
        "name": "dead",
        "seen": 0,
        "turn": 0,
        "registered_at": datetime.now(UTC),
    }
    execute(url, insert(schema.workers).values(row))
    return worker_id


def row_of(url: str, created: CreatedKey) -> Any:
    """Return a key's row."""
    (row,) = execute(url, select(keys).where(keys.c.id == created.key.id))
    return row


def actions_in(url: str) -> list[str]:
    """Return what the audit log says was done, in its order."""
    return [row.action for row in execute(url, select(schema.audit.c.action).order_by("id"))]


async def begin_revoking(
    guard: Guard, clock: ManualClock, created: CreatedKey
) -> "asyncio.Task[Revocation]":
    """Revoke a key through *guard* and return when that is committed and waits for others."""
    return await begin_waiting(clock, guard.keys.revoke("acme", created.key.id))


async def has_seen(url: str, guard: Guard, number: int) -> None:
    """Return once the register says that *guard* has seen the change with that number."""
    await until(lambda: register_of(url)[freshness_of(guard).worker_id] >= number, what="seen")


async def test_alone_nobody_is_waited_for(database_url: str) -> None:
    """With one process revoking returns at once, and a second time there is no such key."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create(guard)
        await guard.verify(created.token)
        done = await guard.keys.revoke("acme", created.key.id)
        assert done == Revocation(how="acknowledged", workers=1, seconds=0)
        assert guard.recall(as_headers(created.token.encode())) is None
        assert await refusal(guard, created.token) == "revoked"
        row = row_of(database_url, created)
        assert row.revoked_at <= row.confirmed_at
        with pytest.raises(KeyNotFound):
            await guard.keys.revoke("acme", created.key.id)
    assert row_of(database_url, created) == row
    assert actions_in(database_url) == ["api_key.created", "api_key.revoked"]


async def test_another_process_is_waited_for(database_url: str) -> None:
    """Revoking returns when the other process has read of it, and both refuse the key then."""
    clock, other_clock = ManualClock(), ManualClock()
    async with (
        new_guard(database_url, clock=clock) as guard,
        new_guard(database_url, clock=other_clock) as other,
    ):
        created = await create(guard)
        await other_clock.pass_time(POLL)
        assert (await other.verify(created.token)).key_id == created.key.id
        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(1)
        assert not revoking.done()
        assert other.recall(as_headers(created.token.encode())) is not None

        await other_clock.pass_time(POLL)
        assert other.recall(as_headers(created.token.encode())) is None
        await has_seen(database_url, other, 2)
        await clock.pass_time(0.05)
        done = await revoking
        assert (done.how, done.workers) == ("acknowledged", 2)
        assert 1 <= done.seconds <= 1.05
        for each in (guard, other):
            assert await refusal(each, created.token) == "revoked"


async def test_ones_own_process_refuses_at_once(database_url: str) -> None:
    """From the commit on, long before revoking returns, the key is refused where it was revoked."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created, kept = await create(guard), await create(guard)
        for token in (created.token, kept.token):
            await guard.verify(token)
            assert guard.recall(as_headers(token.encode())) is not None
        enter_dead_process(database_url)
        revoking = await begin_revoking(guard, clock, created)
        assert guard.recall(as_headers(created.token.encode())) is None
        assert await refusal(guard, created.token) == "revoked"
        assert guard.recall(as_headers(kept.token.encode())) is not None
        await clock.pass_time(LONGEST_WAIT)
        assert (await revoking).how == "lease"


async def test_a_dead_process_delays_two_revocations(database_url: str) -> None:
    """Who never reads the feed is waited for until 1.5 leases have passed: marked, then removed."""
    async with new_guard(database_url) as guard:
        created = [await create(guard) for _ in range(3)]
    dead = enter_dead_process(database_url)
    # Marked, it may still live, and believe what it remembers, and so it is waited for again.
    for before, after in ((0, MARKED), (MARKED, None)):
        clock = ManualClock()
        async with new_guard(database_url, clock=clock) as guard:
            revoking = await begin_revoking(guard, clock, created.pop())
            await clock.pass_time(LONGEST_WAIT - 0.01)
            assert not revoking.done()
            assert register_of(database_url)[dead] == before
            await clock.pass_time(0.02)
            done = await revoking
            assert (done.how, done.workers) == ("lease", 2)
            assert LONGEST_WAIT <= done.seconds < LONGEST_WAIT + 0.02
            assert register_of(database_url).get(dead) == after
    async with new_guard(database_url, clock=ManualClock()) as guard:
        done = await guard.keys.revoke("acme", created.pop().key.id)
        assert done == Revocation(how="acknowledged", workers=1, seconds=0)


async def test_the_register_is_read_once_more_when_the_wait_is_over(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it said just before does not count: who was silent may have found a link since."""
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard)
        enter_dead_process(sqlite_url)
        read_register = store_of(guard).read_register
        reads: list[float] = []

        async def noted() -> Register:
            reads.append(clock.monotonic())
            return await read_register()

        monkeypatch.setattr(store_of(guard), "read_register", noted)
        began = clock.monotonic()
        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(LONGEST_WAIT)
        assert (await revoking).how == "lease"
        assert reads[-1] >= began + LONGEST_WAIT


async def test_who_came_while_revoking_waited_is_not_struck_off(database_url: str) -> None:
    """Only who was silent all along is struck off: a process that came later had less time."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create(guard)
        dead = enter_dead_process(database_url)
        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(1)
        late = enter_dead_process(database_url)
        await clock.pass_time(LONGEST_WAIT - 1)
        assert (await revoking).how == "lease"
        assert register_of(database_url)[dead] == MARKED
        assert register_of(database_url)[late] == 0


async def test_who_is_struck_off_alive_still_counts(database_url: str) -> None:
    """A process that is fresh although it was just struck off is waited for by the next."""
    clock, sleeping = ManualClock(), ManualClock()
    async with (
        new_guard(database_url, clock=clock) as guard,
        new_guard(database_url, clock=sleeping) as sleeper,
    ):
        first, second = await create(guard), await create(guard)
        await sleeping.pass_time(POLL)
        await sleeper.verify(second.token)
        place = freshness_of(sleeper).worker_id
        revoking = await begin_revoking(guard, clock, first)
        await clock.pass_time(LONGEST_WAIT)
        assert (await revoking).how == "lease"
        # Its clock stands still: as if it had read the feed in the last moment before.
        assert register_of(database_url)[place] == MARKED
        assert sleeper.recall(as_headers(second.token.encode())) is not None
        revoking = await begin_revoking(guard, clock, second)
        await clock.pass_time(LONGEST_WAIT - 0.1)
        assert not revoking.done()
        await sleeping.pass_time(POLL)
        assert sleeper.recall(as_headers(second.token.encode())) is None
        await clock.pass_time(0.1)
        await revoking
        assert await refusal(sleeper, second.token) == "revoked"


async def test_a_process_that_was_struck_off_starts_afresh(database_url: str) -> None:
    """A process that slept too long finds itself struck off, forgets all, and registers anew."""
    clock, sleeping = ManualClock(), ManualClock()
    async with (
        new_guard(database_url, clock=clock) as guard,
        new_guard(database_url, clock=sleeping) as sleeper,
    ):
        first, second = await create(guard), await create(guard)
        await sleeping.pass_time(POLL)
        for created in (first, second):
            await sleeper.verify(created.token)
        before = freshness_of(sleeper).worker_id
        revoking = await begin_revoking(guard, clock, first)
        await clock.pass_time(LONGEST_WAIT)
        assert (await revoking).how == "lease"
        assert register_of(database_url)[before] == MARKED

        # It wakes: its lease is over, and it knows that without asking anybody.
        sleeping.advance(LONGEST_WAIT)
        for created in (first, second):
            assert sleeper.recall(as_headers(created.token.encode())) is None
        assert await refusal(sleeper, first.token) == "revoked"
        await sleeping.pass_time(POLL)
        assert sleeper.counters.flushes >= 1
        assert len(local_of(sleeper)) == 0
        after = freshness_of(sleeper).worker_id
        assert after != before
        assert {*register_of(database_url)} == {freshness_of(guard).worker_id, after}
        await has_seen(database_url, sleeper, 3)

        # It takes part again: it may answer from memory, and is waited for.
        assert (await sleeper.verify(second.token)).key_id == second.key.id
        assert sleeper.recall(as_headers(second.token.encode())) is not None
        revoking = await begin_revoking(guard, clock, second)
        await sleeping.pass_time(POLL)
        await has_seen(database_url, sleeper, 4)
        await clock.pass_time(0.05)
        assert (await revoking).how == "acknowledged"
        assert await refusal(sleeper, second.token) == "revoked"


async def test_revoking_again_joins_the_wait(database_url: str) -> None:
    """Cancelled while waiting, a revocation holds; asked for again, it waits, and is made once."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create(guard)
        enter_dead_process(database_url)
        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(1)
        revoking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await revoking
        row = row_of(database_url, created)
        assert row.revoked_at is not None
        assert row.confirmed_at is None
        assert await refusal(guard, created.token) == "revoked"
        assert await guard.keys.list("acme") == []

        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(LONGEST_WAIT)
        assert (await revoking).how == "lease"
        confirmed = row_of(database_url, created)
        assert confirmed._asdict() | {"confirmed_at": None} == row._asdict()
        assert confirmed.confirmed_at is not None
        with pytest.raises(KeyNotFound):
            await guard.keys.revoke("acme", created.key.id)
    assert actions_in(database_url) == ["api_key.created", "api_key.revoked"]
    changes = execute(database_url, select(schema.changes.c.kind).order_by("id"))
    assert [change.kind for change in changes] == ["created", "revoked"]


async def test_what_is_not_confirmed_is_listed_until_it_is(database_url: str) -> None:
    """Revoked keys are listed from their revocation to its confirmation, the latest first."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        one, two, other = [await create(guard) for _ in range(3)]
        await guard.keys.revoke("acme", other.key.id)
        assert await guard.keys.unconfirmed("acme") == []
        enter_dead_process(database_url)
        for created in (one, two):
            revoking = await begin_revoking(guard, clock, created)
            revoking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await revoking
            await clock.pass_time(1)
        assert await guard.keys.unconfirmed("acme") == [two.key, one.key]
        assert await guard.keys.unconfirmed("other") == []
        again = asyncio.create_task(guard.keys.revoke("acme", two.key.id))
        await clock.pass_time(LONGEST_WAIT)
        assert (await again).how == "lease"
        assert await guard.keys.unconfirmed("acme") == []


async def test_two_callers_wait_for_one_revocation(database_url: str) -> None:
    """Who revokes a key while another caller waits for the same waits too; it is made once."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create(guard)
        enter_dead_process(database_url)
        first = await begin_revoking(guard, clock, created)
        second = asyncio.create_task(guard.keys.revoke("acme", created.key.id))
        await clock.wait_for_sleepers(5)
        await clock.pass_time(LONGEST_WAIT)
        assert [(await call).how for call in (first, second)] == ["lease", "lease"]
    assert actions_in(database_url) == ["api_key.created", "api_key.revoked"]


async def test_revoking_again_elsewhere_is_as_good(database_url: str) -> None:
    """A process that joins another's revocation refuses the key before it has read of it."""
    clock, other_clock = ManualClock(), ManualClock()
    async with (
        new_guard(database_url, clock=clock) as guard,
        new_guard(database_url, clock=other_clock) as other,
    ):
        created = await create(guard)
        await other_clock.pass_time(POLL)
        await other.verify(created.token)
        revoking = await begin_revoking(guard, clock, created)
        revoking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await revoking
        assert other.recall(as_headers(created.token.encode())) is not None

        revoking = await begin_revoking(other, other_clock, created)
        await clock.pass_time(POLL)
        await has_seen(database_url, guard, 2)
        await has_seen(database_url, other, 1)
        await other_clock.pass_time(0.05)
        done = await revoking
        assert (done.how, done.workers) == ("acknowledged", 2)
        # It has not read the feed meanwhile.
        assert register_of(database_url)[freshness_of(other).worker_id] == 1
        assert other.recall(as_headers(created.token.encode())) is None
        assert await refusal(other, created.token) == "revoked"


async def test_without_the_register_the_longest_wait_is_taken(database_url: str) -> None:
    """Where nobody can tell who caches, revoking waits until not even a link is trusted."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create(guard)
        dead = enter_dead_process(database_url)
        execute(database_url, HIDE)
        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(CONFIRM_SECONDS)
        with pytest.raises(NotConfirmed):
            await revoking
        assert await refusal(guard, created.token) == "revoked"
        await clock.pass_time(UNFED_WAIT - CONFIRM_SECONDS - 1)
        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(0.9)
        assert not revoking.done()
        await clock.pass_time(0.2)
        done = await revoking
        assert (done.how, done.workers) == ("lease", 0)
        assert UNFED_WAIT <= done.seconds < UNFED_WAIT + 0.1
        execute(database_url, SHOW)
        # Nobody was seen to be silent, and so nobody is struck off.
        assert dead in register_of(database_url)


async def test_a_register_that_can_be_read_again_ends_the_wait(database_url: str) -> None:
    """As soon as it can be told that everybody has seen the change, revoking returns."""
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create(guard)
        execute(database_url, HIDE)
        revoking = await begin_revoking(guard, clock, created)
        await clock.pass_time(1)
        assert not revoking.done()
        execute(database_url, SHOW)
        await clock.pass_time(0.06)
        done = await revoking
        assert (done.how, done.workers) == ("acknowledged", 1)
        assert 1 <= done.seconds <= 1.06
