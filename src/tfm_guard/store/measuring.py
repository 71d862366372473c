"""Measuring a database as processes use it, and leaving nothing behind."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import Connection, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.records import Tally
from tfm_guard.store import schema, usage
from tfm_guard.store.usage import UsageRows

_SAMPLE: Final = 1000  # keys that are looked at
_ROOM: Final = text(
    "SELECT current_setting('max_connections')::int"
    " - current_setting('superuser_reserved_connections')::int AS admitted,"
    # Who is no superuser sees of others' sessions neither what they are nor whether.
    " sum(numbackends)::int AS used FROM pg_stat_database"
)


class Sample(NamedTuple):
    """What some keys have on average, in bytes: the ids of their accounts, and their names."""

    keys: int
    account_id_bytes: float
    name_bytes: float


class Room(NamedTuple):
    """How many connections a server admits in all, and how many more than there are."""

    admitted: int
    free: int


async def sample_keys(connection: AsyncConnection) -> Sample:
    """Look at some keys, whichever come first."""
    some = select(schema.keys.c.account_id, schema.keys.c.name).limit(_SAMPLE)
    rows = (await connection.execute(some)).all()
    sums = [sum(len(cell.encode()) for cell in cells) for cells in zip(*rows, strict=True)]
    accounts, names = (total / len(rows) for total in sums) if rows else (0.0, 0.0)
    return Sample(len(rows), accounts, names)


async def count_room(connection: AsyncConnection) -> Room | None:
    """Return what room a server has for connections; none for SQLite, which has no server."""
    if connection.dialect.name == "sqlite":
        return None
    row = (await connection.execute(_ROOM)).one()
    return Room(row.admitted, max(row.admitted - row.used, 0))


def time_flush(
    connection: Connection,
    tallies: Sequence[Tally],
    rows: UsageRows,
    monotonic: Callable[[], float],
) -> float:
    """Return the seconds that adding *rows* takes, and roll the transaction back.

    They are of keys that exist in this transaction only, so nobody else waits for their rows.
    """
    _insert_keys(connection, [UUID(bytes=tally.key_id) for tally in tallies])
    started = monotonic()
    usage.add(connection, uuid4(), rows, datetime.now(UTC))
    seconds = monotonic() - started
    transaction = connection.get_transaction()
    if transaction is not None:
        transaction.rollback()
    return seconds


def _insert_keys(connection: Connection, ids: Sequence[UUID]) -> None:
    account_id = f"tfm-guard tune {uuid4()}"
    row = {
        "account_id": account_id,
        "name": "tfm-guard tune",
        "secret_hash": "",
        "scopes": "",
        "version": 1,
        "created_at": datetime.now(UTC),
        "created_by": "command_line",
    }
    connection.execute(insert(schema.accounts), {"id": account_id, "plan": "free"})
    # A prefix that no token has: "~" is not hexadecimal.
    rows = [row | {"id": id_, "prefix": f"~{number:07}"} for number, id_ in enumerate(ids)]
    connection.execute(insert(schema.keys), rows)
