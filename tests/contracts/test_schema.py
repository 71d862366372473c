"""Facts about the tables: made once, the same everywhere, and refused where they do not fit."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, select
from sqlalchemy.engine import Engine

import tfm_guard.store
from tests.contracts.conftest import NewStore
from tests.support.crowd import run_crowd
from tests.support.sql import engine_for, execute
from tfm_guard.errors import SchemaError
from tfm_guard.store import Store, schema

MIGRATIONS = Path(tfm_guard.store.__file__).parent / "migrations"

OPENERS = """
from tfm_guard.clock import SystemClock
from tfm_guard.store import Store

async def main(url):
    store = Store(url, pool_size=2, clock=SystemClock())
    wait_for_start()
    installation = await store.open()
    await store.close()
    print(installation.id, installation.root_secret.hex(), installation.tag_key.hex())

asyncio.run(main(sys.argv[1]))
"""


def set_revision(url: str, revision: str) -> None:
    """Pretend that another release made the tables."""
    execute(url, f"UPDATE {schema.VERSION_TABLE} SET version_num = '{revision}'")  # noqa: S608


def scripts() -> ScriptDirectory:
    """Return the migrations that the package ships."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return ScriptDirectory.from_config(config)


def test_head_is_the_newest_migration() -> None:
    """The code asks for the last migration there is, and their names sort in their order."""
    revisions = [script.revision for script in scripts().walk_revisions()]
    assert scripts().get_heads() == [schema.HEAD]
    assert revisions == sorted(revisions, reverse=True)


async def test_the_migrations_make_the_tables_of_the_code(store: Store, database_url: str) -> None:
    """What the migrations have made differs in nothing from what the queries are built on."""
    with engine_for(database_url).connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "version_table": schema.VERSION_TABLE,
            },
        )
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == schema.HEAD


async def test_an_installation_keeps_what_its_processes_share(
    database_url: str, new_store: NewStore
) -> None:
    """Every opening finds the same name, two secrets of 32 bytes, and lease and poll in seconds."""
    first, second = new_store(database_url), new_store(database_url)
    made = await first.open()
    assert await second.open() == await first.open() == made
    assert {len(made.root_secret), len(made.tag_key), len(made.id)} == {32}
    assert made.root_secret != made.tag_key
    assert (made.lease, made.poll_interval) == (2, 0.25)
    shared = {row.name: row.value for row in execute(database_url, select(schema.settings))}
    assert shared == {
        "installation_id": made.id,
        "lease_seconds": "2",
        "poll_seconds": "0.25",
        "linked_poll_seconds": "1",
        "unfed_seconds": "60",
        "signs_hour": "",
    }
    execute(database_url, "UPDATE tfm_settings SET value = '3.5' WHERE name = 'lease_seconds'")
    assert await second.open() == made._replace(lease=3.5)


async def test_a_new_database_starts_its_feed_at_zero(store: Store, database_url: str) -> None:
    """There is one head, 0, no change, and nobody in the register."""
    assert [tuple(row) for row in execute(database_url, select(schema.feed))] == [(1, 0)]
    assert execute(database_url, select(schema.changes)) == []
    assert execute(database_url, select(schema.workers)) == []


async def test_upgrading_says_what_it_did(database_url: str, new_store: NewStore) -> None:
    """The first upgrade makes the tables, the second finds nothing to do."""
    store = new_store(database_url)
    assert await store.upgrade() == (None, schema.HEAD)
    assert await store.upgrade() == (schema.HEAD, schema.HEAD)


async def test_newer_tables_are_refused(store: Store, database_url: str) -> None:
    """Tables of a later release are neither used nor touched, and the error says so."""
    set_revision(database_url, "9999")
    for attempt in (store.open, store.upgrade):
        with pytest.raises(SchemaError, match=r"revision 9999, newer .*\(0001\).*Install"):
            await attempt()
    ((revision,),) = execute(database_url, f"SELECT version_num FROM {schema.VERSION_TABLE}")  # noqa: S608
    assert revision == "9999"


async def test_older_tables_are_refused_with_advice(store: Store, database_url: str) -> None:
    """Tables of an earlier release are not upgraded unasked; the error names the command."""
    set_revision(database_url, "0000")
    with pytest.raises(SchemaError, match=r"0000, this release needs 0001.*tfm-guard db upgrade"):
        await store.open()


async def test_eight_processes_open_one_empty_database(database_url: str) -> None:
    """All eight succeed and find one and the same installation."""
    printed = await asyncio.to_thread(run_crowd, OPENERS, [[database_url]] * 8)
    assert len(set(printed)) == 1
    secrets = execute(database_url, select(schema.secrets.c.value))
    assert len(secrets) == 2
    assert all(secret.value.hex() in printed[0] for secret in secrets)
    assert len(execute(database_url, select(schema.feed))) == 1


async def test_a_file_in_use_is_switched_to_wal_later(sqlite_url: str, new_store: NewStore) -> None:
    """A writer that keeps SQLite from changing its journal only delays the first opening."""
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("CREATE TABLE another_programs (x)")
    writer.execute("BEGIN IMMEDIATE")
    attempts = 0

    def let_the_third_attempt_succeed(_: Any, __: Any, statement: str, *___: Any) -> None:
        nonlocal attempts
        attempts += statement == "PRAGMA journal_mode = WAL"
        if attempts == 3 and writer.in_transaction:
            writer.execute("COMMIT")

    store = new_store(sqlite_url)
    event.listen(Engine, "before_cursor_execute", let_the_third_attempt_succeed)
    try:
        await store.open()
    finally:
        event.remove(Engine, "before_cursor_execute", let_the_third_attempt_succeed)
    assert attempts == 3
    writer.close()
    await store.close()
    assert [tuple(row) for row in execute(sqlite_url, "PRAGMA journal_mode")] == [("wal",)]
