"""Reading the feed of changes, and the register of processes that cache."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.records import Change
from tfm_guard.store import schema

# How many changes are read at a time: well within the deadline of a read, on a slow machine too.
PAGE: Final = 10_000
# What a struck-off process has "seen": less than anything.
MARKED: Final = -1
_HEAD: Final = select(schema.feed.c.head).scalar_subquery()
_REGISTER: Final = select(
    schema.feed.c.head, schema.workers.c.id, schema.workers.c.seen, schema.workers.c.link
).select_from(schema.feed.outerjoin(schema.workers, true()))
# Made once: an idle process does little else than execute it.
_STATE: Final = select(_HEAD.label("head"), schema.workers.c.turn).where(
    schema.workers.c.id == bindparam("worker_id"), schema.workers.c.seen >= 0
)


class Place(NamedTuple):
    """What a process says of itself in the register.

    It has applied the feed up to *seen*, and hears of changes on *link*, if on any. Of its writes
    only one with a higher *turn* than the last is taken: one that comes late says what was once.
    """

    seen: int
    link: str | None
    turn: int


class Member(NamedTuple):
    """A process as the register has it."""

    seen: int
    link: str | None


class Register(NamedTuple):
    """The processes in the register, at a moment when the feed had come to *head*."""

    head: int
    members: dict[UUID, Member]


class FeedState(NamedTuple):
    """The feed at one moment, for a process in the register."""

    head: int
    now: datetime  # the database's time
    turn: int  # of the place that the register has for the process


async def register(connection: AsyncConnection, worker_id: UUID, name: str, now: datetime) -> None:
    """Enter a process that is about to cache. It has seen nothing yet."""
    await connection.execute(
        insert(schema.workers).values(id=worker_id, name=name, seen=0, turn=0, registered_at=now)
    )


async def unregister(connection: AsyncConnection, worker_id: UUID) -> None:
    """Strike off a process that has ceased to cache."""
    await connection.execute(delete(schema.workers).where(schema.workers.c.id == worker_id))


async def state(connection: AsyncConnection, worker_id: UUID, now: datetime) -> FeedState | None:
    """Return the feed's state at *now*, the time of SQLite's machine, for a registered process."""
    row = (await connection.execute(_STATE, {"worker_id": worker_id})).one_or_none()
    return None if row is None else FeedState(row.head, now, row.turn)


async def state_and_record(
    connection: AsyncConnection, worker_id: UUID, place: Place
) -> FeedState | None:
    """Record the *place* of a process; return the feed's state if it is in the register."""
    now = func.clock_timestamp(type_=schema.UtcDateTime()).label("now")
    # Where the head is lower, the database was set back, and what was seen is not what is there.
    statement = (
        record(worker_id, place)
        .where(place.seen <= _HEAD)
        .returning(_HEAD.label("head"), now, schema.workers.c.turn)
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else FeedState(*row)


def record(worker_id: UUID, place: Place) -> Update:
    """Return what records the *place* of a process, if it is in the register."""
    workers = schema.workers.c
    in_turn = workers.turn < place.turn
    return (
        update(schema.workers)
        .where(_is_registered(worker_id))
        .values(
            seen=case((in_turn, place.seen), else_=workers.seen),
            link=case((in_turn, place.link), else_=workers.link),
            turn=case((in_turn, place.turn), else_=workers.turn),
        )
    )


def _is_registered(worker_id: UUID) -> ColumnElement[bool]:
    workers = schema.workers.c
    return and_(workers.id == worker_id, workers.seen >= 0)


async def read_register(connection: AsyncConnection) -> Register:
    """Return the registered processes, and the head of the feed in the same moment."""
    return register_of((await connection.execute(_REGISTER)).all())


def register_of(rows: Sequence[Any]) -> Register:
    """Return the register that is in *rows*: of each process the head, its id, seen and link."""
    members = {worker: Member(seen, link) for _, worker, seen, link in rows if worker is not None}
    return Register(rows[0][0], members)


async def strike_off(
    connection: AsyncConnection, silent: Iterable[UUID], seen: int, marked: Iterable[UUID]
) -> None:
    """Mark those of *silent* that have still not seen as far as *seen*; remove the *marked* ones.

    A mark says to the process, should it live, that it has no place here any more; to others, that
    it may still trust what it remembers. Only after another full wait it cannot.
    """
    workers = schema.workers.c
    await connection.execute(
        delete(schema.workers).where(workers.id.in_(list(marked)), workers.seen == MARKED)
    )
    await connection.execute(
        update(schema.workers)
        .where(workers.id.in_(list(silent)), workers.seen < seen)
        .values(seen=MARKED)
    )


async def head(connection: AsyncConnection) -> int:
    """Return the number of the latest change."""
    number: int = (await connection.execute(select(schema.feed.c.head))).scalar_one()
    return number


async def changes_between(connection: AsyncConnection, seen: int, head: int) -> list[Change]:
    """Return the changes after *seen* up to *head*, in their order."""
    columns = schema.changes.c
    rows = await connection.execute(
        _CHANGES.where(columns.id > seen, columns.id <= head).order_by(columns.id)
    )
    return [Change(*row) for row in rows]


async def changes_since(
    connection: AsyncConnection, *, moment: datetime, after: int
) -> list[Change]:
    """Return the first `PAGE` of the changes since *moment* and after number *after*."""
    columns = schema.changes.c
    rows = await connection.execute(
        _CHANGES.where(columns.created_at > moment, columns.id > after)
        .order_by(columns.id)
        .limit(PAGE)
    )
    return [Change(*row) for row in rows]


_CHANGES: Final = select(
    schema.changes.c.id, schema.changes.c.kind, schema.changes.c.prefix, schema.changes.c.version
)
