"""Reading the audit log."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.records import AuditEvent, AuditRow
from tfm_guard.store import schema

R = TypeVar("R", bound=AuditRow)

_log: Final = schema.audit.c


async def newest(
    connection: AsyncConnection,
    account_id: str,
    *,
    since: ColumnElement[datetime],
    where: Mapping[str, str],
    limit: int,
) -> tuple[list[AuditRow], int]:
    """Return up to *limit* rows of the account, newest first, and how many there are.

    Those are meant that were written after *since* and have in each column of *where* its value.
    """
    wanted = [_log.account_id == account_id, _log.created_at > since]
    wanted += [_log[name] == value for name, value in where.items()]
    total = await connection.execute(select(func.count()).select_from(schema.audit).where(*wanted))
    rows = await connection.execute(
        _select(AuditRow)
        .where(*wanted)
        .order_by(_log.created_at.desc(), _log.id.desc())
        .limit(limit)
    )
    return [_row(row, AuditRow) for row in rows], total.scalar_one()


async def following(
    connection: AsyncConnection, after: int, *, account_id: str | None, limit: int
) -> list[AuditEvent]:
    """Return up to *limit* rows with ids above *after*, in their order: of one account, or all."""
    statement = _select(AuditEvent).where(_log.id > after).order_by(_log.id).limit(limit)
    if account_id is not None:
        statement = statement.where(_log.account_id == account_id)
    return [_row(row, AuditEvent) for row in await connection.execute(statement)]


def _select(kind: type[R]) -> Any:
    return select(*(_log[name] for name in kind.__struct_fields__))


def _row(row: Any, kind: type[R]) -> R:
    return kind(**{**row._asdict(), "meta": msgspec.json.decode(row.meta)})
