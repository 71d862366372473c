"""Facts about transactions that meet: the head of the feed, and what is tried again."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, select
from sqlalchemy.engine import Engine

from tests.support.keys import create_key, insert_key
from tests.support.servers import wait_until
from tests.support.sql import execute
from tfm_guard.clock import SystemClock
from tfm_guard.errors import Unavailable
from tfm_guard.store import Account, Store, Transaction, schema


@contextmanager
def before_each_commit(probe: Callable[[], None]) -> Iterator[None]:
    """Call *probe* when all statements of a transaction have run, just before its COMMIT."""

    def listener(_connection: Any) -> None:
        probe()

    event.listen(Engine, "commit", listener)
    try:
        yield
    finally:
        event.remove(Engine, "commit", listener)


def numbers_in(url: str) -> list[int]:
    """Return the numbers in the feed."""
    return [row.id for row in execute(url, select(schema.changes.c.id).order_by("id"))]


def prefixes_in(url: str) -> list[str]:
    """Return the prefixes of all keys."""
    return [row.prefix for row in execute(url, select(schema.keys.c.prefix).order_by("prefix"))]


def set_default(url: str, setting: str) -> None:
    """Change a PostgreSQL setting for all connections to come."""
    execute(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET {setting}")


async def wait_for_a_blocked_backend(url: str) -> None:
    """Return once somebody in the PostgreSQL database waits for a lock."""
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    await asyncio.to_thread(wait_until, lambda: bool(execute(url, query)), what="a lock wait")


async def test_the_head_is_locked_until_commit_on_postgresql(
    postgres_store: Store, postgres_url: str
) -> None:
    """Just before COMMIT nobody else can take a number; before, and after it, everybody can."""
    probe = psycopg.connect(postgres_url, autocommit=True)
    ask = "SELECT head FROM tfm_feed FOR UPDATE NOWAIT"
    refused: list[type[Exception]] = []

    def try_head() -> None:
        try:
            probe.execute(ask)
        except psycopg.Error as error:
            refused.append(type(error))

    async def work(transaction: Transaction) -> None:
        await insert_key(transaction, "00000001")
        assert probe.execute(ask).fetchall() == [(0,)]

    with probe:
        with before_each_commit(try_head):
            await postgres_store.transact(work)
        assert refused == [psycopg.errors.LockNotAvailable]
        assert probe.execute(ask).fetchall() == [(1,)]


async def test_the_head_is_locked_until_commit_on_sqlite(sqlite_url: str) -> None:
    """From its start to its COMMIT a change holds the file's one write lock."""
    store = Store(sqlite_url, pool_size=10, clock=SystemClock())
    await store.open()
    probe = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), timeout=0, isolation_level=None)
    refused: list[str] = []

    def try_write() -> None:
        try:
            probe.execute("UPDATE tfm_feed SET head = head")
        except sqlite3.OperationalError as error:
            refused.append(str(error))

    async def work(transaction: Transaction) -> None:
        try_write()
        await insert_key(transaction, "00000001")

    with before_each_commit(try_write):
        await store.transact(work)
    assert refused == ["database is locked"] * 2
    assert probe.execute("UPDATE tfm_feed SET head = head RETURNING head").fetchall() == [(1,)]
    probe.close()
    await store.close()


@pytest.mark.parametrize(("end", "number"), [("COMMIT", 2), ("ROLLBACK", 1)])
async def test_numbering_waits_for_who_holds_the_head(
    postgres_store: Store, postgres_url: str, end: str, number: int
) -> None:
    """A change waits for an uncommitted number, and takes the next, or the same if given back."""
    with psycopg.connect(postgres_url, autocommit=True) as holder:
        holder.execute("BEGIN")
        holder.execute("UPDATE tfm_feed SET head = head + 1")
        change = asyncio.create_task(create_key(postgres_store, "00000001"))
        await wait_for_a_blocked_backend(postgres_url)
        assert prefixes_in(postgres_url) == []
        holder.execute(end)
    await change
    assert numbers_in(postgres_url) == [number]


async def test_a_serialization_failure_is_tried_again(postgres_url: str) -> None:
    """A transaction that PostgreSQL cannot serialize runs again as a whole, and counts once."""
    set_default(postgres_url, "default_transaction_isolation = 'repeatable read'")
    store = Store(postgres_url, pool_size=10, clock=SystemClock())
    await store.open()
    await create_key(store, "00000001")
    runs = 0

    async def work(transaction: Transaction) -> None:
        nonlocal runs
        runs += 1
        await insert_key(transaction, "00000002", account_id="another")
        if runs == 1:
            execute(postgres_url, "UPDATE tfm_accounts SET plan = 'pro' WHERE id = 'acme'")
        assert (await transaction.lock_account("acme")).plan == "pro"

    await store.transact(work)
    assert runs == 2
    assert numbers_in(postgres_url) == [1, 2]
    await store.close()


async def test_a_deadlock_is_tried_again(postgres_url: str) -> None:
    """Of two transactions that wait for each other one runs again, and both take place."""
    set_default(postgres_url, "deadlock_timeout = '20ms'")
    store = Store(postgres_url, pool_size=10, clock=SystemClock())
    await store.open()
    runs = 0
    holding = {"one": asyncio.Event(), "two": asyncio.Event()}

    async def lock_both(first: str, second: str, prefix: str) -> None:
        async def work(transaction: Transaction) -> None:
            nonlocal runs
            runs += 1
            await transaction.lock_account(first)
            holding[first].set()
            await holding[second].wait()
            await insert_key(transaction, prefix, account_id=second)

        await store.transact(work)

    await create_key(store, "00000000", account_id="one")
    await create_key(store, "00000001", account_id="two")
    await asyncio.gather(lock_both("one", "two", "00000002"), lock_both("two", "one", "00000003"))
    assert runs >= 3
    assert prefixes_in(postgres_url) == [f"0000000{n}" for n in range(4)]
    assert numbers_in(postgres_url) == [1, 2, 3, 4]
    await store.close()


async def test_a_lock_that_is_not_given_in_time_is_tried_again(
    postgres_store: Store, postgres_url: str
) -> None:
    """After 1.5 s of waiting for a lock the transaction starts anew, and succeeds in the end."""
    again = asyncio.Event()
    runs = 0

    async def work(transaction: Transaction) -> Account:
        nonlocal runs
        runs += 1
        if runs == 2:
            again.set()
        return await transaction.lock_account("acme")

    await create_key(postgres_store, "00000001")
    with psycopg.connect(postgres_url, autocommit=True) as holder:
        holder.execute("BEGIN")
        holder.execute("SELECT FROM tfm_accounts FOR UPDATE")
        change = asyncio.create_task(postgres_store.transact(work))
        await again.wait()
        holder.execute("COMMIT")
    assert (await change).id == "acme"
    assert runs == 2


async def test_connections_that_died_idle_are_replaced(
    postgres_store: Store, postgres_url: str
) -> None:
    """A restarted server, or a proxy that hung up, costs no request: reads and changes go on."""
    await asyncio.gather(*(create_key(postgres_store, f"0000000{n}") for n in range(5)))
    await asyncio.gather(*(postgres_store.find_keys(["00000001"]) for _ in range(5)))
    query = """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
        WHERE application_name = 'tfm-guard' AND datname = current_database()"""
    assert len(execute(postgres_url, query)) >= 4
    found = await asyncio.gather(*(postgres_store.find_keys(["00000001"]) for _ in range(5)))
    assert [list(rows) for rows in found] == [["00000001"]] * 5
    await asyncio.gather(*(create_key(postgres_store, f"0000001{n}") for n in range(5)))
    assert numbers_in(postgres_url) == list(range(1, 11))


async def test_a_connection_lost_at_commit_is_not_tried_again(
    postgres_store: Store, postgres_url: str
) -> None:
    """Where nobody knows whether the change took place, it is not made a second time."""
    runs = 0

    def hang_up() -> None:
        query = """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
            WHERE application_name = 'tfm-guard' AND state = 'idle in transaction'"""
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            assert connection.execute(query).fetchall() == [(True,)]

    async def work(transaction: Transaction) -> None:
        nonlocal runs
        runs += 1
        await insert_key(transaction, "00000001")

    with before_each_commit(hang_up), pytest.raises(Unavailable):
        await postgres_store.transact(work)
    assert runs == 1
    assert prefixes_in(postgres_url) == []
    await create_key(postgres_store, "00000001")
    assert numbers_in(postgres_url) == [1]
