"""Facts about databases that do not answer: every call ends in time, and nothing is half done."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
from sqlalchemy import Engine, event, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.contracts.conftest import NewStore
from tests.support.keys import create_key
from tests.support.postgres import PostgresServer
from tests.support.servers import free_port, wait_until
from tests.support.sql import execute
from tfm_guard.clock import SystemClock
from tfm_guard.errors import ConfigurationError, Unavailable
from tfm_guard.store import Store, schema
from tfm_guard.store.database import Database

pytestmark = pytest.mark.alone


async def refusal(call: Awaitable[Any]) -> tuple[str, float]:
    """Return why *call* is unavailable, and after how many seconds that was known."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(Unavailable) as caught:
        await call
    return caught.value.reason, loop.time() - started


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Make a database with one connection to read."""
    database = Database(database_url, pool_size=1)
    database.adopt_file()
    yield database
    await database.close()


async def hold(database: Database, holding: asyncio.Event, release: asyncio.Event) -> None:
    """Read for as long as *release* is not set."""

    async def work(_: AsyncConnection) -> None:
        holding.set()
        await release.wait()

    await database.read(work)


async def test_a_read_waits_half_a_second_for_a_connection(database: Database) -> None:
    """With every connection in use a read is refused after 0.5 s, and goes through afterwards."""
    holding, release = asyncio.Event(), asyncio.Event()
    holder = asyncio.create_task(hold(database, holding, release))
    async with asyncio.timeout(10):
        await holding.wait()
    reason, seconds = await refusal(database.read(lambda c: c.exec_driver_sql("SELECT 1")))
    assert reason == "all database connections are in use"
    assert 0.4 < seconds < 0.9
    release.set()
    await holder
    await database.read(lambda c: c.exec_driver_sql("SELECT 1"))


async def test_a_read_that_takes_too_long_gives_its_connection_back(database: Database) -> None:
    """After 1 s a read is given up, and the only connection serves the next one."""
    reason, seconds = await refusal(hold(database, asyncio.Event(), asyncio.Event()))
    assert reason == "the database did not answer within 1 s"
    assert 0.9 < seconds < 1.4
    await database.read(lambda c: c.exec_driver_sql("SELECT 1"))


async def test_many_requests_share_few_connections(
    database_url: str, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 reads at once are all answered, and never use more than 2 connections."""
    # How fast the machine is at this moment is not what this is about.
    for limit in ("READ_SECONDS", "_POOL_SECONDS"):
        monkeypatch.setattr(f"tfm_guard.store.database.{limit}", 60.0)
    store = new_store(database_url, pool_size=2)
    await store.open()
    await create_key(store, "00000001")
    used: set[int] = set()

    def note(connection: Any, *_: Any) -> None:
        used.add(id(connection.connection.dbapi_connection))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        found = await asyncio.gather(*(store.find_keys(["00000001"]) for _ in range(200)))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert all(list(rows) == ["00000001"] for rows in found)
    assert len(used) == 2


async def test_a_foreign_writer_on_sqlite(sqlite_url: str, new_store: NewStore) -> None:
    """While another program holds the file, reads go on and changes fail within about 5 s."""
    store = new_store(sqlite_url, pool_size=2)
    await store.open()
    await create_key(store, "00000001")
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    changes = [asyncio.create_task(refusal(create_key(store, f"0000000{n}"))) for n in (2, 3)]
    reads = 0
    while not all(change.done() for change in changes):
        assert list(await store.find_keys(["00000001", "00000002"])) == ["00000001"]
        reads += 1
    assert reads > 100
    for change in changes:
        _, seconds = await change
        assert 4.5 < seconds < 5.5
    holder.execute("ROLLBACK")
    holder.close()
    await create_key(store, "00000004")
    keys = execute(sqlite_url, select(schema.keys.c.prefix).order_by("prefix"))
    assert [key.prefix for key in keys] == ["00000001", "00000004"]
    assert [row.id for row in execute(sqlite_url, select(schema.changes.c.id))] == [1, 2]


async def test_a_frozen_server_on_postgresql(
    postgres_server: PostgresServer, postgres_url: str, new_store: NewStore
) -> None:
    """Reads end after 1 s without an answer; thawed, the server has no connection too many."""
    store = new_store(postgres_url, pool_size=2)
    await store.open()
    await create_key(store, "00000001")
    postgres_server.freeze()
    reads = [refusal(store.find_keys(["00000001"])) for _ in range(4)]
    for reason, seconds in await asyncio.gather(*reads):
        assert reason in {
            "the database did not answer within 1 s",
            "all database connections are in use",
        }
        assert 0.4 < seconds < 1.4
    postgres_server.thaw()
    recovered = False
    while not recovered:
        found = await asyncio.gather(
            *(store.find_keys(["00000001"]) for _ in range(2)), return_exceptions=True
        )
        recovered = not any(isinstance(rows, BaseException) for rows in found)
    mine = """SELECT 1 FROM pg_stat_activity
        WHERE application_name = 'tfm-guard' AND datname = current_database()"""
    await asyncio.to_thread(
        # Two connections for reading, and the one with which the key was created.
        wait_until,
        lambda: len(execute(postgres_url, mine)) <= 3,
        what="no connection too many",
    )
    await create_key(store, "00000002")
    await store.close()
    await asyncio.to_thread(
        wait_until, lambda: not execute(postgres_url, mine), what="no connection left"
    )


async def test_a_stopped_server_on_postgresql(
    postgres_server: PostgresServer, postgres_url: str, new_store: NewStore
) -> None:
    """Reads and changes fail at once while there is no server, and succeed once it is back."""
    store = new_store(postgres_url, pool_size=2)
    await store.open()
    await create_key(store, "00000001")
    postgres_server.stop()
    for call in (store.find_keys(["00000001"]), create_key(store, "00000002")):
        reason, seconds = await refusal(call)
        assert reason.startswith("database: OperationalError")
        assert seconds < 0.5
    postgres_server.start()
    assert list(await store.find_keys(["00000001", "00000002"])) == ["00000001"]
    await create_key(store, "00000002")


async def test_a_server_that_is_not_there(new_store: NewStore) -> None:
    """Opening fails with Unavailable whose reason names the fault and not the password."""
    url = f"postgresql://guard:hunter2@127.0.0.1:{free_port()}/keys"
    store = new_store(url, pool_size=2)
    reason, _ = await refusal(store.open())
    assert "refused" in reason
    assert "hunter2" not in reason + repr(store)


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "mysql://guard:hunter2@localhost/keys",
        "sqlite://",
        "sqlite:///:memory:",
        "postgresql://guard:hunter2@localhost:port/keys",
    ],
)
def test_a_faulty_url_is_told_at_once(url: str) -> None:
    """A URL that cannot work is refused before anything connects, without showing its password."""
    with pytest.raises(ConfigurationError, match="TFM_GUARD_DATABASE_URL") as caught:
        Store(url, pool_size=2, clock=SystemClock())
    assert "hunter2" not in str(caught.value)
