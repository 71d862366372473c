"""Facts about usage in the database, on both kinds: added once, only ever raised, and forgotten."""

import asyncio
import random
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, event, insert, select, update

from tests.contracts.conftest import NewStore
from tests.support.keys import create_key, revoke_key
from tests.support.servers import wait_until
from tests.support.sql import engine_for, execute
from tfm_guard.errors import Unavailable
from tfm_guard.records import Tally
from tfm_guard.store import Store, Transaction, UsageHour, schema

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)
HOUR = int(NOON.timestamp()) // 3600


def tally_of(
    key_id: UUID, *, hour: int = HOUR, accepted: int = 1, refused: int = 0, minute: float = 30
) -> Tally:
    """Return counts of a key in an *hour* since 1970, last accepted in that *minute* of it."""
    used_at = hour * 3600 + minute * 60 if accepted else None
    return Tally(key_id.bytes, hour, accepted, refused, used_at)


def hours_of(url: str) -> list[tuple[UUID, datetime, int, int]]:
    """Return all rows of counts."""
    order = (schema.usage_hours.c.key_id, schema.usage_hours.c.hour)
    return [tuple(row) for row in execute(url, select(schema.usage_hours).order_by(*order))]


def last_uses_of(url: str) -> dict[UUID, datetime]:
    """Return when each key was last used."""
    return {row.key_id: row.last_used_at for row in execute(url, select(schema.key_usage))}


def rest_of(url: str) -> dict[str, list[Any]]:
    """Return all that is not usage."""
    usage = {"tfm_usage_hours", "tfm_key_usage", "tfm_flushes"}
    tables = [table for table in schema.metadata.sorted_tables if table.name not in usage]
    return {table.name: execute(url, select(table)) for table in tables}


def many_keys(url: str, count: int) -> list[UUID]:
    """Insert *count* keys of acme, whose prefixes are their numbers; return their ids."""
    ids = [uuid4() for _ in range(count)]
    columns = {
        "account_id": "acme",
        "name": "one of many",
        "secret_hash": "",
        "scopes": "send",
        "version": 1,
        "created_at": NOON,
        "created_by": "a test",
    }
    execute(url, insert(schema.accounts).values(id="acme", plan="free"))
    with engine_for(url).begin() as connection:
        rows = [{**columns, "id": id_, "prefix": f"{n:08x}"} for n, id_ in enumerate(ids)]
        connection.execute(insert(schema.keys), rows)
    return ids


async def revoke(store: Store, key_id: UUID) -> None:
    """Revoke a key."""

    async def work(transaction: Transaction) -> None:
        key = await transaction.lock_key("acme", key_id)
        assert key is not None
        await transaction.change_key("revoked", key, revoked_at=transaction.now)

    await store.transact(work)


async def test_counts_add_up_and_last_uses_only_rise(store: Store, database_url: str) -> None:
    """A later flush adds to an hour's counts; a last use that is earlier changes nothing."""
    one, two = await create_key(store, "00000001"), await create_key(store, "00000002")
    await store.add_usage(uuid4(), [tally_of(one.id, accepted=3, refused=1)])
    both = [tally_of(one.id, accepted=4, minute=10), tally_of(two.id, accepted=0, refused=5)]
    await store.add_usage(uuid4(), both)
    hours = [(one.id, NOON, 7, 1), (two.id, NOON, 0, 5)]
    assert hours_of(database_url) == sorted(hours)
    assert last_uses_of(database_url) == {one.id: NOON + timedelta(minutes=30)}
    await store.add_usage(uuid4(), [tally_of(one.id, hour=HOUR + 1, minute=0.5)])
    assert last_uses_of(database_url) == {one.id: NOON + timedelta(hours=1, seconds=30)}
    (listed,) = [key for key in await store.list_keys("acme") if key.id == one.id]
    assert listed.last_used_at == NOON + timedelta(hours=1, seconds=30)


async def test_one_flush_may_have_several_hours_of_a_key(store: Store, database_url: str) -> None:
    """Each hour gets its counts, and the last use is the latest of all, to the microsecond."""
    key = await create_key(store, "00000001")
    tallies = [tally_of(key.id, hour=HOUR + n, accepted=n + 1) for n in (2, 0, 1)]
    tallies[0].used_at = (NOON + timedelta(hours=2, microseconds=250_000)).timestamp()
    await store.add_usage(uuid4(), tallies)
    assert [row[1:] for row in hours_of(database_url)] == [
        (NOON + timedelta(hours=n), n + 1, 0) for n in range(3)
    ]
    assert last_uses_of(database_url)[key.id] == NOON + timedelta(hours=2, seconds=0.25)


async def test_what_was_added_is_not_added_again(store: Store, database_url: str) -> None:
    """The same flush counts once, however often it is written; another one counts."""
    key = await create_key(store, "00000001")
    flush_id = uuid4()
    for _ in range(3):
        await store.add_usage(flush_id, [tally_of(key.id, accepted=2)])
    assert hours_of(database_url) == [(key.id, NOON, 2, 0)]
    await store.add_usage(uuid4(), [tally_of(key.id, accepted=2)])
    assert hours_of(database_url) == [(key.id, NOON, 4, 0)]


async def test_a_flush_cut_off_counts_once_when_it_is_written_again(
    store: Store, database_url: str
) -> None:
    """Cancelled at any of its moments and then repeated, a flush counts exactly once."""
    key = await create_key(store, "00000001")
    for number in range(30):
        flush_id = uuid4()
        flushing = asyncio.create_task(store.add_usage(flush_id, [tally_of(key.id)]))
        for _ in range(number):
            await asyncio.sleep(0)
        flushing.cancel()
        await asyncio.wait({flushing})
        await store.add_usage(flush_id, [tally_of(key.id)])
        assert hours_of(database_url) == [(key.id, NOON, number + 1, 0)]


async def test_a_key_that_is_gone_does_not_stop_the_others(store: Store, database_url: str) -> None:
    """Keys that never were and keys of erased accounts get no rows, the rest of the flush does."""
    key, erased = await create_key(store, "00000001"), await create_key(store, "00000002")
    execute(database_url, insert(schema.accounts).values(id="", plan="free"))
    erase = update(schema.keys).where(schema.keys.c.id == erased.id).values(account_id="")
    execute(database_url, erase)
    await store.add_usage(uuid4(), [tally_of(each) for each in (uuid4(), erased.id, key.id)])
    assert [row[0] for row in hours_of(database_url)] == [key.id]
    assert [*last_uses_of(database_url)] == [key.id]


async def test_a_flush_changes_nothing_but_usage(store: Store, database_url: str) -> None:
    """Neither a key's state nor the feed moves: a revoked key stays as it was, used or not."""
    key, revoked = await create_key(store, "00000001"), await create_key(store, "00000002")
    await revoke_key(store, revoked)
    before = rest_of(database_url)
    await store.add_usage(uuid4(), [tally_of(each) for each in (key.id, revoked.id, uuid4())])
    assert rest_of(database_url) == before
    assert len(hours_of(database_url)) == 2


async def test_a_flush_is_one_statement_for_each_table(store: Store) -> None:
    """10,000 hours of keys are three statements that write, each with few parameters."""
    written: list[tuple[str, int]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("INSERT"):
            written.append((statement.split()[2], len(parameters)))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        await store.add_usage(uuid4(), [tally_of(uuid4()) for _ in range(10_000)])
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert [table for table, _ in written] == ["tfm_flushes", "tfm_key_usage", "tfm_usage_hours"]
    assert all(parameters <= 5 for _, parameters in written)


async def test_processes_that_flush_the_same_keys_wait_and_do_not_deadlock(
    database_url: str, new_store: NewStore
) -> None:
    """Four stores add 200 keys in any order at the same time; nothing fails, nothing is lost."""
    stores = [new_store(database_url) for _ in range(4)]
    await stores[0].open()
    keys = many_keys(database_url, 200)
    for store in stores[1:]:
        await store.open()

    async def flush(store: Store) -> None:
        for _ in range(5):
            tallies = [tally_of(key_id) for key_id in random.sample(keys, len(keys))]
            await store.add_usage(uuid4(), tallies)

    await asyncio.gather(*map(flush, stores))
    assert {row[2] for row in hours_of(database_url)} == {20}
    assert len(hours_of(database_url)) == 200


@pytest.mark.alone
async def test_revoking_does_not_wait_for_a_large_flush(store: Store, database_url: str) -> None:
    """While 10,000 keys are flushed, over and over, a key is revoked in half a second."""
    keys = many_keys(database_url, 10_000)
    flushing = True

    async def flush() -> int:
        count = 0
        while flushing:
            await store.add_usage(uuid4(), [tally_of(key_id) for key_id in keys])
            count += 1
        return count

    task = asyncio.create_task(flush())
    took = []
    for key_id in keys[:10]:
        started = time.perf_counter()
        await revoke(store, key_id)
        took.append(time.perf_counter() - started)
        await asyncio.sleep(random.uniform(0, 0.05))  # at any moment of a flush
    flushing = False
    assert await task > 0
    assert max(took) < 0.5
    found = await store.find_keys(f"{number:08x}" for number in range(11))
    assert sum(row.revoked_at is not None for row in found.values()) == 10


async def test_revoking_does_not_wait_for_a_stuck_flush(
    postgres_store: Store, postgres_url: str, new_store: NewStore
) -> None:
    """With one connection for changes, and a flush that waits for a lock, revoking goes on."""
    store = new_store(postgres_url, pool_size=1)
    key = await create_key(postgres_store, "00000001")
    await store.add_usage(uuid4(), [tally_of(key.id)])
    with engine_for(postgres_url).connect() as holder:
        holder.exec_driver_sql("LOCK TABLE tfm_key_usage IN EXCLUSIVE MODE")
        flush = asyncio.create_task(store.add_usage(uuid4(), [tally_of(key.id)]))
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        await asyncio.to_thread(
            wait_until, lambda: bool(execute(postgres_url, waiting)), what="the flush to wait"
        )
        async with asyncio.timeout(1):
            await revoke_key(store, key)
        assert not flush.done()
        holder.rollback()
    await flush
    assert hours_of(postgres_url) == [(key.id, NOON, 2, 0)]


async def test_a_flush_that_finds_sqlite_locked_fails_and_can_be_repeated(
    sqlite_url: str, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unavailable while another program writes, and counts once when it is written again."""
    monkeypatch.setattr("tfm_guard.store.database.WRITE_SECONDS", 0.2)
    store = new_store(sqlite_url)
    await store.open()
    key = await create_key(store, "00000001")
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    flush_id = uuid4()
    with pytest.raises(Unavailable):
        await store.add_usage(flush_id, [tally_of(key.id)])
    holder.execute("ROLLBACK")
    holder.close()
    await store.add_usage(flush_id, [tally_of(key.id)])
    assert hours_of(sqlite_url) == [(key.id, NOON, 1, 0)]


async def test_usage_is_shown_to_its_account_alone(store: Store) -> None:
    """Hours of the span come in their order with the database's time; others' keys have none."""
    key = await create_key(store, "00000001")
    other = await create_key(store, "00000002")
    now = int(time.time()) // 3600
    ages = (0, 1, 23, 25)
    await store.add_usage(uuid4(), [tally_of(key.id, hour=now - age) for age in ages])
    await store.add_usage(uuid4(), [tally_of(other.id, hour=now)])
    await revoke_key(store, key)
    found = await store.read_usage("acme", key.id, timedelta(hours=24))
    assert found is not None
    moment, hours = found
    assert abs(moment - datetime.now(UTC)) < timedelta(seconds=30)
    first = datetime.fromtimestamp(now * 3600, UTC)
    assert hours[-1] == UsageHour(first, 1, 0)
    assert [first - hour.start for hour in hours] == [timedelta(hours=n) for n in (23, 1, 0)]
    assert await store.read_usage("evil", key.id, timedelta(hours=24)) is None
    assert await store.read_usage("acme", uuid4(), timedelta(hours=24)) is None


async def test_pruning_keeps_what_is_shown_and_what_may_be_repeated(
    store: Store, database_url: str
) -> None:
    """Hours of 92 days, flush ids of a day stay; older ones and those of erased keys go."""
    key, erased = await create_key(store, "00000001"), await create_key(store, "00000002")
    now = int(time.time()) // 3600
    ages = (0, 90 * 24, 91 * 24, 93 * 24, 400 * 24)
    await store.add_usage(uuid4(), [tally_of(key.id, hour=now - age) for age in ages])
    await store.add_usage(uuid4(), [tally_of(erased.id, hour=now)])
    execute(database_url, insert(schema.accounts).values(id="", plan="free"))
    erase = update(schema.keys).where(schema.keys.c.id == erased.id).values(account_id="")
    execute(database_url, erase)
    old = [{"id": uuid4(), "created_at": NOON - timedelta(days=9000)} for _ in range(3)]
    for row in old:
        execute(database_url, insert(schema.flushes).values(row))
    assert await store.prune_usage() == 2 + 3 + 2
    starts = [row[1] for row in hours_of(database_url)]
    assert [int(start.timestamp()) // 3600 for start in starts] == [
        now - age for age in reversed(ages[:3])
    ]
    assert [*last_uses_of(database_url)] == [key.id]
    assert len(execute(database_url, select(schema.flushes))) == 2
    assert await store.prune_usage() == 0
