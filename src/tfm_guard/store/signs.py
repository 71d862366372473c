"""What looking for signs of trouble reads and writes."""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.records import ApiKey
from tfm_guard.store import schema
from tfm_guard.store.transaction import Transaction, is_active, key_of

_LAST_LOOK: Final = schema.settings.c.name == "signs_hour"
_HOUR_SECONDS: Final = 3600


class HourOfUse(NamedTuple):
    """What a key was used for in one hour, numbered from 1970 on."""

    key_id: UUID
    hour: int
    accepted: int
    refused: int


class Said(NamedTuple):
    """What was last said of a key: *sign*, upon an *occasion*."""

    key_id: UUID
    sign: str
    occasion: datetime


def hour_of(moment: datetime) -> int:
    """Return the number of the hour that *moment* is in."""
    return int(moment.timestamp()) // _HOUR_SECONDS


def start_of(hour: int) -> datetime:
    """Return when the *hour* of that number began."""
    return datetime.fromtimestamp(hour * _HOUR_SECONDS, UTC)


async def active_keys(
    connection: AsyncConnection, after: UUID, limit: int, now: ColumnElement[datetime]
) -> list[ApiKey]:
    """Return up to *limit* active keys with ids above *after*, of accounts not suspended."""
    wanted = _keys(now).where(schema.keys.c.id > after).order_by(schema.keys.c.id).limit(limit)
    return [key_of(row, row.last_used_at) for row in await connection.execute(wanted)]


async def use_in(
    connection: AsyncConnection, key_ids: Collection[UUID], hours: Iterable[int]
) -> list[HourOfUse]:
    """Return what the keys were used for in these *hours*, where they were used at all."""
    use = schema.usage_hours.c
    wanted = _USE.where(use.key_id.in_(key_ids), use.hour.in_([start_of(hour) for hour in hours]))
    return [_hour_of_use(row) for row in await connection.execute(wanted)]


async def use_since(
    connection: AsyncConnection, key_id: UUID, hour: int
) -> tuple[list[HourOfUse], int]:
    """Return what a key was used for from an *hour* on, and the first hour that it ever was."""
    use = schema.usage_hours.c
    rows = await connection.execute(_USE.where(use.key_id == key_id, use.hour >= start_of(hour)))
    first = await connection.execute(select(func.min(use.hour)).where(use.key_id == key_id))
    hours = [_hour_of_use(row) for row in rows]
    begun = first.scalar_one()
    return hours, hour if begun is None else hour_of(begun)


async def said(connection: AsyncConnection, key_ids: Collection[UUID]) -> list[Said]:
    """Return what was last said of these keys."""
    rows = await connection.execute(select(schema.signs).where(schema.signs.c.key_id.in_(key_ids)))
    return [Said(*row) for row in rows]


class Turn:
    """A process's turn to say something, in a transaction: until it ends, no other has one."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self._connection = transaction.connection

    async def take(self) -> int | None:
        """Wait for the turn; return the last hour that was claimed, if any was."""
        lock = select(schema.settings.c.value).where(_LAST_LOOK).with_for_update()
        value: str = (await self._connection.execute(lock)).scalar_one()
        return int(value) if value else None

    async def claim(self, hour: int) -> bool:
        """Take the turn, and claim *hour*; tell whether nobody had claimed it, or a later one."""
        last = await self.take()
        if last is not None and hour <= last:
            return False
        await self._connection.execute(
            update(schema.settings).where(_LAST_LOOK).values(value=str(hour))
        )
        return True

    async def said(self, key_ids: Collection[UUID]) -> list[Said]:
        """Return what was last said of these keys."""
        return await said(self._connection, key_ids)

    async def keep_keys(self, key_ids: Collection[UUID]) -> list[ApiKey]:
        """Return those of the keys that are still active, and keep them as they are.

        A key that is being changed is left out, so this waits for nobody.
        """
        wanted = _keys(self._transaction.now).where(schema.keys.c.id.in_(key_ids))
        held = wanted.with_for_update(read=True, of=schema.keys, skip_locked=True)
        rows = await self._connection.execute(held)
        return [key_of(row, row.last_used_at) for row in rows]

    async def note(self, signs: Sequence[Said]) -> None:
        """Record what is said, which is not nothing."""
        dialect: Any = postgresql if self._connection.dialect.name == "postgresql" else sqlite
        new = dialect.insert(schema.signs)
        latest = new.on_conflict_do_update(
            index_elements=["key_id", "sign"], set_={"occasion": new.excluded.occasion}
        )
        await self._connection.execute(latest, [sign._asdict() for sign in signs])


def _keys(now: Any) -> Select[Any]:
    keys, usage = schema.keys, schema.key_usage
    return (
        select(keys, usage.c.last_used_at)
        .join(schema.accounts, schema.accounts.c.id == keys.c.account_id)
        .outerjoin(usage, usage.c.key_id == keys.c.id)
        .where(schema.accounts.c.suspended_at.is_(None), *is_active(now))
    )


def _hour_of_use(row: Row[Any]) -> HourOfUse:
    return HourOfUse(row.key_id, hour_of(row.hour), row.accepted, row.refused)


_USE: Final = select(schema.usage_hours)
