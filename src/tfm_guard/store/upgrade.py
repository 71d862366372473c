"""Bringing the tables up, once, whoever comes first; and telling when they do not fit."""

import asyncio
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, select, text
from sqlalchemy import column as sql_column
from sqlalchemy import table as sql_table
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.errors import SchemaError, Unavailable
from tfm_guard.store.database import WRITE_SECONDS, Database
from tfm_guard.store.schema import HEAD, VERSION_TABLE

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_VERSION: Final = sql_table(VERSION_TABLE, sql_column("version_num"))
_UPGRADE_SECONDS: Final = 600.0
# An arbitrary number that means "tfm-guard changes the schema" to PostgreSQL's advisory locks.
_LOCK: Final = 0x74666D67


async def ensure_schema(database: Database) -> None:
    """Make the tables in an empty database; raise `SchemaError` if they are of another release."""
    database.adopt_file()
    revision = await database.read(read_revision)
    if revision is None:
        await upgrade(database)
        return
    _refuse_newer(revision)
    if revision != HEAD:
        raise SchemaError(
            f"The database's tables are at revision {revision}, this release needs {HEAD}. "
            "Run: tfm-guard db upgrade"
        )


async def upgrade(database: Database) -> tuple[str | None, str]:
    """Apply the missing migrations in one transaction; return the revision before and after."""
    database.adopt_file()
    if database.dialect == "sqlite":
        await _switch_to_wal(database)

    async def work(connection: AsyncConnection) -> str | None:
        if database.dialect == "postgresql":
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        # Asked again under the lock: another process may just have done it.
        before = await read_revision(connection)
        _refuse_newer(before)
        if before != HEAD:
            await connection.run_sync(_apply)
        return before

    return await database.write(work, seconds=_UPGRADE_SECONDS), HEAD


def _refuse_newer(revision: str | None) -> None:
    if revision is not None and revision > HEAD:
        raise SchemaError(
            f"The database's tables are at revision {revision}, newer than this release knows "
            f"({HEAD}). Install the release that upgraded them, or a later one."
        )


async def read_revision(connection: AsyncConnection) -> str | None:
    """Return the revision of the tables; none if there are none."""
    if not await connection.run_sync(lambda sync: inspect(sync).has_table(VERSION_TABLE)):
        return None
    revision: str | None = (await connection.execute(select(_VERSION))).scalar_one_or_none()
    return revision


def _apply(connection: Connection) -> None:
    # Imported here: alembic costs a quarter of a second, and an upgrade is rare.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _switch_to_wal(database: Database) -> None:
    """Let readers and the writer of a SQLite file work side by side, for good."""

    async def work(connection: AsyncConnection) -> None:
        await connection.exec_driver_sql("PRAGMA journal_mode = WAL")

    # SQLite does not wait for others that do the same at this moment, but gives up at once.
    deadline = asyncio.get_running_loop().time() + WRITE_SECONDS
    while True:
        try:
            return await database.read(work)
        except Unavailable as error:
            if "locked" not in error.reason or asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.01)
