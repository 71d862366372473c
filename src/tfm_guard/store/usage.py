"""Adding what was counted to the usage of keys, reading it, and forgetting what is old."""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Executable,
    FromClause,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    func,
    literal_column,
    select,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.records import Tally
from tfm_guard.store import schema
from tfm_guard.store.transaction import ERASED_ACCOUNT

T = TypeVar("T")

# The longest range that is shown has 90 days, of which the first is not over when it begins.
_HOURS_KEPT: Final = timedelta(days=92)
# Beyond an hour nobody writes a batch again.
_FLUSHES_KEPT: Final = timedelta(days=1)
# Rows removed in one transaction, which keeps other changes on SQLite waiting.
_PRUNED: Final = 5_000
_STEP: Final = 500  # rows prepared without letting the event loop do something else
_HOUR_SECONDS: Final = 3600


class UsageHour(NamedTuple):
    """The requests with a key in the hour from *start* on."""

    start: datetime
    accepted: int
    refused: int


class UsageRows(NamedTuple):
    """Rows to be added: as few parameters for each statement, however many rows; none for none."""

    last_used: dict[str, str]
    hours: dict[str, str]


async def rows_of(tallies: Sequence[Tally], dialect: str) -> UsageRows:
    """Return *tallies* as rows. A key may have several, each of another hour."""
    last_used: dict[str, float] = {}
    hours = _Parameters(dialect)
    for some in _steps(tallies):
        rows = []
        for tally in some:
            key_id = tally.key_id.hex()
            rows.append((key_id, _hour(tally.hour), tally.accepted, tally.refused))
            if tally.used_at is not None:
                last_used[key_id] = max(tally.used_at, last_used.get(key_id, tally.used_at))
        hours.add(rows)
        await asyncio.sleep(0)
    moments = _Parameters(dialect)
    for used in _steps(list(last_used.items())):
        moments.add([(key_id, _text_of(moment)) for key_id, moment in used])
        await asyncio.sleep(0)
    return UsageRows(moments.by_name(), hours.by_name())


def _steps(all_: Sequence[T]) -> Iterator[Sequence[T]]:
    return (all_[start : start + _STEP] for start in range(0, len(all_), _STEP))


class _Parameters:
    """Rows as the parameters of `_rows`: of PostgreSQL an array for each column, else JSON.

    PostgreSQL takes twice as long for rows in JSON, SQLite has no arrays.
    """

    def __init__(self, dialect: str) -> None:
        self._in_arrays = dialect == "postgresql"
        self._texts: list[list[str]] = []  # of each addition: one for each parameter

    def add(self, rows: Sequence[tuple[str | int, ...]]) -> None:
        if self._in_arrays:
            columns = zip(*rows, strict=True)
            self._texts.append([",".join(map(str, column)) for column in columns])
        else:
            self._texts.append([msgspec.json.encode(rows).decode()[1:-1]])

    def by_name(self) -> dict[str, str]:
        first, last = "{}" if self._in_arrays else "[]"
        return {
            _name(number): first + ",".join(texts) + last
            for number, texts in enumerate(zip(*self._texts, strict=True))
        }


def add(connection: Connection, flush_id: UUID, rows: UsageRows, now: datetime) -> None:
    """Add *rows* to the usage of those keys that there are, unless *flush_id* was added before."""
    statements = _statements(connection.dialect.name)
    flush = {"id": flush_id, "created_at": now}
    if connection.execute(statements.flush, flush).scalar_one_or_none() is None:
        return
    if rows.last_used:
        connection.execute(statements.last_used, rows.last_used)
    if rows.hours:
        connection.execute(statements.hours, rows.hours)


async def read(
    connection: AsyncConnection,
    account_id: str,
    key_id: UUID,
    span: timedelta,
    now: ColumnElement[datetime],
) -> tuple[datetime, list[UsageHour]] | None:
    """Return the database's time and the hours of a key in the *span* before; none if not found."""
    keys, hours = schema.keys.c, schema.usage_hours.c
    found = await connection.execute(
        select(now.label("now")).where(keys.id == key_id, keys.account_id == account_id)
    )
    moment = found.scalar_one_or_none()
    if moment is None:
        return None
    rows = await connection.execute(
        select(hours.hour, hours.accepted, hours.refused)
        .where(hours.key_id == key_id, hours.hour > moment - span)
        .order_by(hours.hour)
    )
    return moment, [UsageHour(*row) for row in rows]


async def read_all(
    connection: AsyncConnection, key_ids: Collection[UUID], span: timedelta, now: Any
) -> tuple[datetime, dict[UUID, list[UsageHour]]]:
    """Return the database's time and the hours of each of *key_ids* in the *span* before."""
    hours = schema.usage_hours.c
    moment = (await connection.execute(select(now))).scalar_one()
    rows = await connection.execute(
        select(hours.key_id, hours.hour, hours.accepted, hours.refused)
        .where(hours.key_id.in_(key_ids), hours.hour > moment - span)
        .order_by(hours.hour)
    )
    found: dict[UUID, list[UsageHour]] = {key_id: [] for key_id in key_ids}
    for key_id, *hour in rows:
        found[key_id].append(UsageHour(*hour))
    return moment, found


def prunings(now: datetime) -> list[Delete]:
    """Return statements that each remove some rows that are of no use any more, if there are any.

    To be repeated until none removes anything.
    """
    hours, flushes, used = schema.usage_hours, schema.flushes, schema.key_usage
    erased = select(schema.keys.c.id).where(schema.keys.c.account_id == ERASED_ACCOUNT)
    return [
        _removal(hours, hours.c.hour < now - _HOURS_KEPT),
        _removal(flushes, flushes.c.created_at < now - _FLUSHES_KEPT),
        # A flush may have come just after its key was erased.
        _removal(hours, hours.c.key_id.in_(erased)),
        _removal(used, used.c.key_id.in_(erased)),
    ]


class _Statements(NamedTuple):
    flush: Executable
    last_used: Executable
    hours: Executable


@cache
def _statements(dialect: str) -> _Statements:
    """Return the statements of a flush, each for any number of rows.

    In the order of the keys: two flushes at once that lock the same rows wait, and never for each
    other. A key that there is not, or that was erased, has no rows.
    """
    make: Any = postgresql if dialect == "postgresql" else sqlite
    later = func.greatest if dialect == "postgresql" else func.max
    used, hours = schema.key_usage.c, schema.usage_hours.c
    flush = make.insert(schema.flushes).on_conflict_do_nothing().returning(schema.flushes.c.id)
    last_used = _insert(make, schema.key_usage, dialect)
    last_used = last_used.on_conflict_do_update(
        index_elements=[used.key_id],
        set_={"last_used_at": later(used.last_used_at, last_used.excluded.last_used_at)},
    )
    added = _insert(make, schema.usage_hours, dialect)
    added = added.on_conflict_do_update(
        index_elements=[hours.key_id, hours.hour],
        set_={
            "accepted": hours.accepted + added.excluded.accepted,
            "refused": hours.refused + added.excluded.refused,
        },
    )
    return _Statements(flush, last_used, added)


def _insert(make: Any, table: Table, dialect: str) -> Any:
    """Return what inserts rows of *table*'s columns, which `_Parameters` are."""
    columns, rows = (_in_arrays if dialect == "postgresql" else _in_json)(table)
    keys = schema.keys.c
    chosen = (
        select(*columns)
        .select_from(rows.join(schema.keys, keys.id == columns[0]))
        .where(keys.account_id != ERASED_ACCOUNT)
        .order_by(keys.id, *columns[1:2])
    )
    return make.insert(table).from_select(list(table.c), chosen)


def _in_arrays(table: Table) -> tuple[list[ColumnElement[Any]], FromClause]:
    arrays = [
        cast(bindparam(_name(number), type_=Text()), postgresql.ARRAY(column.type))
        for number, column in enumerate(table.c)
    ]
    names = [column.name for column in table.c]
    rows = func.unnest(*arrays).table_valued(*names).render_derived("counted")
    return list(rows.c), rows


def _in_json(table: Table) -> tuple[list[ColumnElement[Any]], FromClause]:
    rows = func.json_each(bindparam(_name(0), type_=Text())).table_valued("value").alias("counted")
    columns = [
        cast(literal_column(f"json_extract(counted.value, '$[{number}]')"), column.type)
        for number, column in enumerate(table.c)
    ]
    return list(columns), rows


def _name(number: int) -> str:
    """Return the name of a parameter."""
    return f"rows_{number}"


def _removal(table: Table, condition: ColumnElement[bool]) -> Delete:
    key = tuple_(*table.primary_key)
    return delete(table).where(key.in_(select(*table.primary_key).where(condition).limit(_PRUNED)))


def _text_of(moment: float) -> str:
    """Return seconds since 1970 as text that both databases take for a moment."""
    second, rest = divmod(moment, 1.0)
    return f"{_second(int(second))}.{int(rest * 1_000_000):06}Z"


@lru_cache(256)
def _hour(hour: int) -> str:
    return _text_of(hour * _HOUR_SECONDS)


@lru_cache(256)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
