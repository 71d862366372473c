"""The times that all processes share: reading them, and changing them while nobody counts on them.

Whoever revokes a key waits for as long as others may trust their memory, by the times that it knows
itself. So two processes with different times must never be there at once: the times change only
while the register is empty, and nobody enters it who has read others.
"""

from typing import NamedTuple

from sqlalchemy import delete, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.errors import Unavailable
from tfm_guard.store import schema
from tfm_guard.store.feed import MARKED


class Times(NamedTuple):
    """Seconds, by the names that they have in the table."""

    lease_seconds: float  # that a read of the feed, or an answer on the link, counts
    unfed_seconds: float  # after the last read of the feed that the link alone counts
    poll_seconds: float  # between two reads of the feed, while there is no link
    linked_poll_seconds: float  # likewise, while there is one


async def read_times(connection: AsyncConnection) -> Times:
    """Return the times as they are in the table."""
    rows = await connection.execute(
        select(schema.settings).where(schema.settings.c.name.in_(Times._fields))
    )
    return Times(**{row.name: float(row.value) for row in rows})


async def require_times(connection: AsyncConnection, known: Times) -> None:
    """Raise `Unavailable` unless the times are those that are *known* to this process."""
    if await read_times(connection) != known:
        raise Unavailable(
            "the times that all processes share were changed; this process must be started anew"
        )


async def strike_all_off(connection: AsyncConnection) -> bool:
    """Mark all processes in the register; tell whether there were any.

    One that lives finds its mark, forgets everything, and registers anew.
    """
    return (await connection.execute(update(schema.workers).values(seen=MARKED))).rowcount > 0


async def change_times(connection: AsyncConnection, times: Times) -> list[str]:
    """Set the times, unless processes are in the register: then return their names.

    Those that are struck off do not count, and are removed.
    """
    if connection.dialect.name == "postgresql":
        # Who is entering the register has then committed, or comes after this and reads the new.
        await connection.execute(text(f"LOCK {schema.workers} IN SHARE ROW EXCLUSIVE MODE"))
    workers = schema.workers.c
    await connection.execute(delete(schema.workers).where(workers.seen == MARKED))
    names = await connection.execute(select(workers.name).order_by(workers.registered_at))
    if present := list(names.scalars()):
        return present
    for name, value in times._asdict().items():
        row = update(schema.settings).where(schema.settings.c.name == name)
        await connection.execute(row.values(value=f"{value:g}"))
    return []
