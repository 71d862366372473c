"""Looking for signs of trouble: what is said in the audit log, and how often."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import Executable, delete, insert, select, update

from tests.support.crowd import run_crowd
from tests.support.guards import create, new_guard, store_of, until
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import GuardError
from tfm_guard.records import AuditEvent, CreatedKey, Looked
from tfm_guard.signs import BATCH
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
SIGNS = schema.settings.c.name == "signs_hour"
NOTHING = {"idle": 0, "expiring": 0, "unusual_use": 0}

LOOKERS = """
from tests.support.guards import new_guard

async def main(url):
    async with new_guard(url) as guard:
        wait_for_start()
        await asyncio.gather(*(guard.signs.look() for _ in range(3)))

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an empty database."""
    async with new_guard(database_url) as guard:
        yield guard


async def sql(guard: Guard, *statements: Executable) -> None:
    """Change the database past the guard, which may be writing too."""
    for statement in statements:
        await asyncio.to_thread(execute, guard.settings.database_url, statement)


async def set_key(guard: Guard, created: CreatedKey, **columns: Any) -> None:
    """Set columns of a key."""
    keys = schema.keys
    await sql(guard, update(keys).where(keys.c.id == created.key.id).values(columns))


async def set_used(guard: Guard, created: CreatedKey, last_used_at: datetime) -> None:
    """Set when a key was last used."""
    usage, key_id = schema.key_usage, created.key.id
    await sql(
        guard,
        delete(usage).where(usage.c.key_id == key_id),
        insert(usage).values(key_id=key_id, last_used_at=last_used_at),
    )


async def set_hours(
    guard: Guard, key_ids: list[UUID], counts: Mapping[datetime, tuple[int, int]]
) -> None:
    """Set what keys were accepted and refused for in each hour."""
    hours = schema.usage_hours
    rows = [
        {"key_id": key_id, "hour": hour, "accepted": accepted, "refused": refused}
        for key_id in key_ids
        for hour, (accepted, refused) in counts.items()
    ]
    await sql(guard, delete(hours).where(hours.c.key_id.in_(key_ids)), insert(hours).values(rows))


def last_hour() -> datetime:
    """Return the start of the last hour of which all is written."""
    moment = datetime.now(UTC) - timedelta(minutes=1)
    return moment.replace(minute=0, second=0, microsecond=0) - HOUR


def steady(hour: datetime, weeks: float = 8) -> dict[datetime, tuple[int, int]]:
    """Return what a key is used for that gets 100 requests in each hour, to the last."""
    return {hour - number * HOUR: (100, 0) for number in range(round(weeks * 168))}


async def signs_in(guard: Guard) -> list[AuditEvent]:
    """Return what was said so far."""
    events = (await guard.audit.events(limit=500)).items
    return [event for event in events if event.actor == "tfm-guard"]


async def told(guard: Guard) -> list[tuple[str, str]]:
    """Return what was said so far of which key."""
    return [(event.action, event.target_id) for event in await signs_in(guard)]


async def test_there_is_nothing_to_say_of_sound_keys(guard: Guard) -> None:
    """Keys that are new, in use, or end after more than 14 days leave no trace of a look."""
    await create(guard)
    used = await create(guard, expires_at=datetime.now(UTC) + 15 * DAY)
    await set_used(guard, used, datetime.now(UTC) - 89 * DAY)
    assert await guard.signs.look() == Looked(keys=2, **NOTHING)
    assert await told(guard) == []


async def test_an_idle_key_is_told_once_for_each_last_use(guard: Guard) -> None:
    """It is told again only when it was used since, and then lay idle again."""
    idle = await create(guard)
    now = datetime.now(UTC)
    await set_key(guard, idle, created_at=now - 200 * DAY)
    once = [("api_key.idle", str(idle.key.id))]
    for _ in range(2):
        await guard.signs.look()
        assert await told(guard) == once
    await set_used(guard, idle, now - 10 * DAY)
    await guard.signs.look()
    assert await told(guard) == once
    await set_used(guard, idle, now - 90 * DAY)
    await guard.signs.look()
    await guard.signs.look()
    assert await told(guard) == once * 2
    first, second = await signs_in(guard)
    assert (first.account_id, first.target_name, first.category) == ("acme", "CI", "Security")
    assert first.meta["key_prefix"] == idle.key.key_prefix
    since = [datetime.fromisoformat(event.meta["unused_since"]) for event in (first, second)]
    assert since == [now - 200 * DAY, now - 90 * DAY]


async def test_an_expiring_key_is_told_once_for_each_expiry(guard: Guard) -> None:
    """A key that ends within 14 days is told when that is first seen, and if the end changes."""
    soon = datetime.now(UTC) + 13 * DAY
    key = await create(guard, expires_at=soon)
    assert (await guard.signs.look()).expiring == 1
    assert await guard.signs.look() == Looked(keys=1, **NOTHING)
    await set_key(guard, key, expires_at=soon - DAY)
    assert (await guard.signs.look()).expiring == 1
    ends = [datetime.fromisoformat(event.meta["expires_at"]) for event in await signs_in(guard)]
    assert ends == [soon, soon - DAY]


@pytest.mark.parametrize("state", ["replaced", "revoked", "expired", "suspended"])
async def test_keys_that_are_ending_are_no_trouble(guard: Guard, state: str) -> None:
    """Of a key with a successor, one that is no longer active, or a suspended account: nothing."""
    key = await create(guard)
    now = datetime.now(UTC)
    columns: dict[str, dict[str, Any]] = {
        "replaced": {"replaced_by": uuid4(), "expires_at": now + HOUR},
        "revoked": {"revoked_at": now},
        "expired": {"expires_at": now},
        "suspended": {},
    }
    await set_key(guard, key, created_at=now - 100 * DAY, **columns[state])
    if state == "suspended":
        await sql(guard, update(schema.accounts).values(suspended_at=now))
    looked = await guard.signs.look()
    assert looked == Looked(keys=1 if state == "replaced" else 0, **NOTHING)


@pytest.mark.parametrize(
    ("last", "kind", "requests", "usual"),
    [
        ({0: (1000, 0)}, "more_accepted", 1000, 100),
        ({0: (100, 500)}, "more_refused", 500, 0),
        ({0: (0, 0), 1: (1, 0), 2: (2, 0)}, "fewer_accepted", 3, 300),
        ({0: (400, 0)}, None, 0, 0),
    ],
)
async def test_a_sudden_change_in_use_is_told(
    guard: Guard, last: dict[int, tuple[int, int]], kind: str | None, requests: int, usual: int
) -> None:
    """Ten times the use, refusals and silence are told once, with the numbers; noise is not."""
    key = await create(guard)
    hour = last_hour()
    changed = {hour - ago * HOUR: counts for ago, counts in last.items()}
    await set_hours(guard, [key.key.id], steady(hour) | changed)
    await set_used(guard, key, hour)
    for _ in range(2):
        await guard.signs.look()
    expected = {
        "key_prefix": key.key.key_prefix,
        "change": kind,
        "hour": hour.isoformat().replace("+00:00", "Z"),
        "requests": requests,
        "usual": usual,
    }
    said = await signs_in(guard)
    assert [(event.action, event.meta) for event in said] == (
        [("api_key.unusual_use", expected)] if kind else []
    )


@pytest.mark.parametrize(("ago", "count"), [(23, 0), (24, 1)])
async def test_unusual_use_is_told_once_a_day(guard: Guard, ago: int, count: int) -> None:
    """What goes on, or comes again within 24 hours, is not told again."""
    key = await create(guard)
    hour = last_hour()
    await set_hours(guard, [key.key.id], steady(hour) | {hour: (1000, 0)})
    earlier = hour - ago * HOUR
    said = {"key_id": key.key.id, "sign": "unusual_use", "occasion": earlier}
    await sql(guard, insert(schema.signs).values(said))
    assert (await guard.signs.look()).unusual_use == count


async def test_a_young_key_has_no_usual(guard: Guard) -> None:
    """In its first four weeks of use nothing a key does is told."""
    key = await create(guard)
    hour = last_hour()
    await set_hours(guard, [key.key.id], steady(hour, weeks=3.9) | {hour: (100_000, 0)})
    assert (await guard.signs.look()).unusual_use == 0


async def test_every_key_is_looked_at(guard: Guard) -> None:
    """However many there are, each gets its turn, once."""
    count = 2 * BATCH + 3
    keys = [await create(guard, name=f"key {number}") for number in range(count)]
    created_at = datetime.now(UTC) - 100 * DAY
    await sql(guard, update(schema.keys).values(created_at=created_at))
    assert await guard.signs.look() == Looked(keys=count, **{**NOTHING, "idle": count})
    assert sorted(target for _, target in await told(guard)) == sorted(
        str(created.key.id) for created in keys
    )


async def test_processes_that_look_at_once_say_it_once(guard: Guard) -> None:
    """Nine looks in three processes at the same time say each occasion once."""
    keys = [await create(guard, name=f"key {number}") for number in range(70)]
    now, hour = datetime.now(UTC), last_hour()
    await sql(guard, update(schema.keys).values(created_at=now - 100 * DAY))
    surge = {hour - 5 * 168 * HOUR: (1, 0), hour: (1000, 0)}
    await set_hours(guard, [created.key.id for created in keys[:20]], surge)
    url = guard.settings.database_url
    await asyncio.to_thread(run_crowd, LOOKERS, [[url]] * 3)
    said = await told(guard)
    assert len(said) == len(set(said)) == 90
    assert sum(action == "api_key.idle" for action, _ in said) == 70


async def test_what_failed_is_said_by_the_next_look(guard: Guard) -> None:
    """Where the audit row cannot be written, nothing is recorded as said."""
    idle = await create(guard)
    await set_key(guard, idle, created_at=datetime.now(UTC) - 100 * DAY)
    real = store_of(guard).transact
    calls = 0

    async def fail(work: Callable[[Any], Awaitable[Any]]) -> Any:
        async def then_fail(transaction: Any) -> Any:
            nonlocal calls
            calls += 1
            result = await work(transaction)
            if calls > 1:  # the first claims the hour
                raise GuardError("injected")
            return result

        return await real(then_fail)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_of(guard), "transact", fail)
        with pytest.raises(GuardError, match="injected"):
            await guard.signs.look()
    assert await told(guard) == []
    assert (await guard.signs.look()).idle == 1


async def test_a_guard_looks_once_an_hour(sqlite_url: str) -> None:
    """Open, it looks by itself; with two of them open, one of them does, in each hour."""
    clocks = [ManualClock(), ManualClock()]
    looks: list[datetime] = []
    async with (
        new_guard(sqlite_url, clock=clocks[0]) as one,
        new_guard(sqlite_url, clock=clocks[1]) as other,
    ):
        for guard in (one, other):
            real = store_of(guard).active_keys

            async def note(after: UUID, limit: int, real: Any = real) -> Any:
                looks.append(clocks[0].now())
                return await real(after, limit)

            guard.signs._store.active_keys = note  # type: ignore[method-assign]  # noqa: SLF001
        for _ in range(18):
            for clock in clocks:
                await clock.pass_time(600)
    assert [moment.hour for moment in looks] == [0, 1, 2]


async def test_looking_goes_on_after_a_failure(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A look that fails is logged, and does not end the looking."""
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        idle = await create(guard)
        await set_key(guard, idle, created_at=clock.now() - 100 * DAY)
        await sql(guard, update(schema.settings).where(SIGNS).values(name="elsewhere"))
        await clock.pass_time(601)
        assert "signs of trouble were not looked for" in caplog.text
        elsewhere = schema.settings.c.name == "elsewhere"
        await sql(guard, update(schema.settings).where(elsewhere).values(name="signs_hour"))
        await clock.pass_time(600)
        assert await told(guard) == [("api_key.idle", str(idle.key.id))]


async def test_a_key_that_is_being_changed_is_left_for_later(postgres_url: str) -> None:
    """A look waits for no change of a key, and says what there is to say next time."""
    async with new_guard(postgres_url) as guard:
        key = await create(guard)
        await set_key(guard, key, created_at=datetime.now(UTC) - 100 * DAY)
        with psycopg.connect(postgres_url) as holder:
            holder.execute("SELECT FROM tfm_keys FOR UPDATE")
            assert await guard.signs.look() == Looked(keys=1, **NOTHING)
        assert (await guard.signs.look()).idle == 1


async def test_no_revocation_waits_for_a_look(postgres_url: str) -> None:
    """While a look waits for its turn to speak, the key that it has found is revoked as ever."""
    async with new_guard(postgres_url) as guard:
        key, other = await create(guard), await create(guard)
        await sql(guard, update(schema.keys).values(created_at=datetime.now(UTC) - 100 * DAY))
        store = store_of(guard)
        find = store.signs_said
        with psycopg.connect(postgres_url) as holder, pytest.MonkeyPatch.context() as patch:

            async def find_then_lose_the_turn(key_ids: Collection[UUID]) -> Any:
                said = await find(key_ids)
                holder.execute("SELECT FROM tfm_settings WHERE name = 'signs_hour' FOR UPDATE")
                return said

            patch.setattr(store, "signs_said", find_then_lose_the_turn)
            looking = asyncio.create_task(guard.signs.look())
            await until(lambda: _waits(postgres_url), what="the look")
            await guard.keys.revoke("acme", key.key.id)
            assert not looking.done()
        assert (await looking).idle == 1
    assert [row.key_id for row in execute(postgres_url, select(schema.signs))] == [other.key.id]


def _waits(url: str) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return bool(execute(url, query))
