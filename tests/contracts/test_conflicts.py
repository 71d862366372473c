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

from tests.contracts.conftest import NewStore
from tests.support.keys import create_key, insert_key
from tests.support.servers import wait_until
from tests.support.sql import execute
from tfm_guard.errors import Unavailable
from tfm_guard.store import LockedAccount, Store, Transaction, schema


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


async def test_the_head_is_locked_until_commit_on_sqlite(
    sqlite_url: str, new_store: NewStore
) -> None:
    """From its start to its COMMIT a change holds the file's one write lock."""
    store = new_store(sqlite_url)
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


# Refuses the first key, at once or at COMMIT, in the way that PostgreSQL refuses a transaction.
REFUSE_THE_FIRST = """
CREATE SEQUENCE attempts;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('attempts') = 1 THEN RAISE EXCEPTION 'not now' USING ERRCODE = '{sqlstate}'; END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON tfm_keys {when}
    FOR EACH ROW EXECUTE FUNCTION refuse();
"""
AT_ONCE, AT_COMMIT = "NOT DEFERRABLE", "DEFERRABLE INITIALLY DEFERRED"


def refuse_the_first(url: str, sqlstate: str, when: str) -> None:
    """Have the first transaction that inserts a key fail with *sqlstate*."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(REFUSE_THE_FIRST.format(sqlstate=sqlstate, when=when).encode())


@pytest.mark.parametrize("when", [AT_ONCE, AT_COMMIT], ids=["at once", "at COMMIT"])
@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "55P03"])
async def test_a_conflict_is_tried_again(
    postgres_store: Store, postgres_url: str, sqlstate: str, when: str
) -> None:
    """What PostgreSQL refuses for now, even at COMMIT, runs again as a whole, and counts once."""
    refuse_the_first(postgres_url, sqlstate, when)
    runs = 0

    async def work(transaction: Transaction) -> None:
        nonlocal runs
        runs += 1
        await insert_key(transaction, "00000001")

    await postgres_store.transact(work)
    assert runs == 2
    assert prefixes_in(postgres_url) == ["00000001"]
    assert numbers_in(postgres_url) == [1]


@pytest.mark.parametrize("when", [AT_ONCE, AT_COMMIT], ids=["at once", "at COMMIT"])
async def test_what_is_refused_for_good_is_not_tried_again(
    postgres_store: Store, postgres_url: str, when: str
) -> None:
    """A transaction that is refused for another reason runs once, and nothing of it is kept."""
    refuse_the_first(postgres_url, "P0001", when)
    runs = 0

    async def work(transaction: Transaction) -> None:
        nonlocal runs
        runs += 1
        await insert_key(transaction, "00000001")

    with pytest.raises(Unavailable) as caught:
        await postgres_store.transact(work)
    assert caught.value.reason == "database: RaiseException: not now"
    assert runs == 1
    assert prefixes_in(postgres_url) == []


@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"])
async def test_the_servers_default_isolation_is_not_taken(
    postgres_url: str, new_store: NewStore, isolation: str
) -> None:
    """Where a server isolates more by default, 16 changes for 16 accounts at once all succeed."""
    set_default(postgres_url, f"default_transaction_isolation = '{isolation}'")
    store = new_store(postgres_url)
    await store.open()
    changes = (create_key(store, f"{n:08x}", account_id=f"account {n}") for n in range(16))
    await asyncio.gather(*changes)
    assert numbers_in(postgres_url) == list(range(1, 17))


async def test_a_deadlock_is_tried_again(postgres_url: str, new_store: NewStore) -> None:
    """Of two transactions that wait for each other one runs again, and both take place."""
    set_default(postgres_url, "deadlock_timeout = '20ms'")
    store = new_store(postgres_url)
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


async def test_a_lock_that_is_not_given_in_time_is_tried_again(
    postgres_store: Store, postgres_url: str
) -> None:
    """After 1.5 s of waiting for a lock the transaction starts anew, and succeeds in the end."""
    again = asyncio.Event()
    runs = 0

    async def work(transaction: Transaction) -> LockedAccount:
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
    account, changes = await change
    assert (account.id, changes) == ("acme", [])
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
