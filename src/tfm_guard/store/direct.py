"""Connections to PostgreSQL of the driver's own, for what must be quick.

Revoking a key waits for the database, and everybody who is affected waits for that: for one message
to it, with what has been planned before, and without SQLAlchemy's layers.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from sqlalchemy.exc import DBAPIError

from tfm_guard.store.statements import Statement


class DirectConnections:
    """Up to *most* connections, made by psycopg with *options*, and kept.

    They belong to the event loop in which they are used first.
    """

    def __init__(self, options: Mapping[str, Any], *, most: int) -> None:
        self._options: Final = dict(options)
        self._most: Final = most
        self._room = asyncio.Semaphore(most)
        self._idle: list[_Connection] = []
        self.in_use = 0

    def __repr__(self) -> str:
        return f"DirectConnections({self.in_use} of {self._most} in use)"

    async def run(self, statement: Statement, values: Mapping[str, Any]) -> list[TupleRow]:
        """Execute *statement*, with its script, in one round trip; return its rows.

        Raises SQLAlchemy's `DBAPIError`, as what uses SQLAlchemy's connections does; then what the
        script commits may have been committed.
        """
        async with self._room:
            self.in_use += 1
            try:
                return await self._run(statement, values)
            finally:
                self.in_use -= 1

    async def close(self) -> None:
        """Close the connections that are not in use."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.raw.close()

    async def _run(self, statement: Statement, values: Mapping[str, Any]) -> list[TupleRow]:
        # The latest: its server process is the warmest.
        connection = self._idle.pop() if self._idle else None
        try:
            connection = connection or await _connect(self._options)
            rows = await connection.run(statement, values)
        except BaseException as error:
            lost = connection is None or connection.raw.broken
            if connection is not None:
                await connection.raw.close()
            if lost:
                await self.close()  # the others lead to the same server
            if isinstance(error, psycopg.Error):
                raise DBAPIError(None, None, error, connection_invalidated=lost) from None
            raise
        self._idle.append(connection)
        return rows


class _Connection:
    def __init__(self, raw: AsyncConnection, *, prepares: bool) -> None:
        self.raw = raw
        self._prepares = prepares
        self._executions: dict[str, bytes] = {}  # by the name of what is prepared

    async def run(self, statement: Statement, values: Mapping[str, Any]) -> list[TupleRow]:
        if not self._prepares:
            return await _execute(self.raw, statement.unprepared.encode(), values)
        if statement.name not in self._executions:
            await _execute(self.raw, statement.preparation.encode(), {})
            self._executions[statement.name] = statement.execution.encode()
        return await _execute(self.raw, self._executions[statement.name], values)


async def _connect(options: Mapping[str, Any]) -> _Connection:
    raw = await AsyncConnection.connect(**options, autocommit=True)
    ((pid,),) = await _execute(raw, b"SELECT pg_backend_pid()", {})
    # Elsewhere than at PostgreSQL itself, at a PgBouncer in transaction mode, each transaction is
    # another server process's.
    return _Connection(raw, prepares=pid == raw.info.backend_pid)


async def _execute(
    raw: AsyncConnection, script: bytes, values: Mapping[str, Any]
) -> list[TupleRow]:
    # Of this kind, as it sends several statements in one message.
    async with psycopg.AsyncClientCursor(raw) as cursor:
        await cursor.execute(script, values)
        return [row async for each in cursor.results() if each.description async for row in each]
