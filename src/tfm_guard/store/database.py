"""Talking to the database: engines, deadlines, retries, and the mapping of foreign errors."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiosqlite
from sqlalchemy import URL, Connection, Engine, Executable, NullPool, create_engine, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialectAsync_psycopg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tfm_guard.errors import ConfigurationError, GuardError, Unavailable
from tfm_guard.settings import read_database_url
from tfm_guard.store.sqlite_file import SqliteFile
from tfm_guard.store.statements import Statement

if TYPE_CHECKING:
    from tfm_guard.store.direct import DirectConnections

T = TypeVar("T")

READ_SECONDS: Final = 1.0
WRITE_SECONDS: Final = 5.0
_POOL_SECONDS: Final = 0.5  # how long a read waits for a connection
# Connections to revoke keys and to confirm that; and one for what is asked meanwhile.
_CHANGING: Final = 2
_ASKING: Final = 1
_ATTEMPTS: Final = 4  # a transaction is tried again at most 3 times

_DRIVERS: Final = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
# How psycopg connects.
_POSTGRESQL: Final = {
    "connect_timeout": 2,  # seconds, the least that libpq takes
    "prepare_threshold": None,  # PgBouncer in transaction mode knows no prepared statements
    "application_name": "tfm-guard",
    # Never a standby: what it knows of revocations is old.
    "target_session_attrs": "primary",
    # A peer that is gone without a word is noticed by the kernel.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": 5_000,  # milliseconds
}
# Serialization failure, deadlock, lock not available: the whole transaction may succeed next time.
_TRANSIENT_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03"})


class Database:
    """One database behind bounded pools: to read, to write, for the feed, and for usage.

    Every call ends within its deadline, whatever the database does: work that does not is left
    behind, cancelled, and its connection goes back to the pool when the driver lets go of it.
    """

    def __init__(self, url: str, *, pool_size: int) -> None:
        parsed = read_database_url(url)
        self.dialect = parsed.get_backend_name()
        parsed = parsed.set(drivername=_DRIVERS[self.dialect])
        make = _postgresql_engine
        self._file: SqliteFile | None = None
        if self.dialect == "sqlite":
            self._file = SqliteFile(str(parsed.database))
            make = partial(_sqlite_engine, file=self._file)
        try:
            self._reader = make(parsed, pool_size, reading=True)
            self._writer = make(parsed, pool_size, reading=False)
            # The lease hangs on reading the feed, so that never queues behind anything.
            self._feed_reader = make(parsed, 1, reading=True)
            self._changing = self._asking = None
            if self._file is None:
                self._changing = _direct(parsed, most=_CHANGING)
                self._asking = _direct(parsed, most=_ASKING)
            self._usage_writer: AsyncEngine | Engine = (
                make(parsed, 1, reading=False)
                if self._file is None
                else _sqlite_thread_engine(self._file)
            )
        except ImportError as error:
            raise ConfigurationError(
                f"TFM_GUARD_DATABASE_URL: the driver of {self.dialect} cannot be loaded: {error}"
            ) from None
        self._running: set[asyncio.Task[Any]] = set()

    def leave(self) -> None:
        """Close the connections to a file that belong to an event loop that has ended.

        One that was cut off in a transaction would keep all others from writing.
        """
        if self._file is not None:
            _end_connections(self._file.connections)

    def __repr__(self) -> str:
        return f"Database({self.dialect})"

    def has_file(self) -> bool:
        """Tell whether the file of an SQLite database is there; PostgreSQL needs none."""
        return self._file is None or self._file.path.exists()

    def adopt_file(self) -> None:
        """Make the file of an SQLite database if there is none. Raises `Unavailable`."""
        if self._file is None:
            return
        try:
            self._file.adopt()
        except OSError as error:
            raise Unavailable(f"database: {self._file.path}: {error.strerror}") from None

    async def close(self) -> None:
        """Close the pools, after the work still under way has ended."""
        if self._running:
            await asyncio.wait(self._running, timeout=WRITE_SECONDS)
        await self._reader.dispose()
        await self._writer.dispose()
        await self._feed_reader.dispose()
        if isinstance(self._usage_writer, AsyncEngine):
            await self._usage_writer.dispose()
        for connections in (self._changing, self._asking):
            if connections is not None:
                await connections.close()

    async def read(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, seconds: float | None = None
    ) -> T:
        """Return what *work* reads, within *seconds* (`READ_SECONDS`), or raise `Unavailable`.

        Each of its statements commits by itself.
        """
        return await self._read_with(self._reader, work, seconds)

    async def read_feed(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Do as `read` does, on a connection that nothing else uses."""
        return await self._read_with(self._feed_reader, work)

    async def write(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, seconds: float = WRITE_SECONDS
    ) -> T:
        """Run *work* in one transaction and commit it, within *seconds*.

        *work* may run several times: it must do nothing but talk to the connection. Raises
        `Unavailable` where it is not known to have been committed.
        """

        async def attempt(committing: list[bool]) -> T:
            async with self._writer.connect() as connection, connection.begin():
                result = await work(connection)
                committing.append(True)
            return result

        return await self._within(seconds, attempt)

    async def write_usage(self, work: Callable[[Connection], T]) -> T:
        """Do as `write` does, on a connection that no other change waits for.

        On SQLite, where all other writers wait for it, in a thread: so it takes no longer than its
        statements do, whatever else this event loop is busy with.
        """

        async def attempt(committing: list[bool]) -> T:
            if isinstance(self._usage_writer, Engine):
                return await asyncio.to_thread(_write, self._usage_writer, work)
            async with self._usage_writer.connect() as connection, connection.begin():
                result = await connection.run_sync(work)
                committing.append(True)
            return result

        return await self._within(WRITE_SECONDS, attempt)

    async def write_one(self, statement: Executable) -> None:
        """Execute one *statement*, which commits by itself: a third of the round trips of `write`.

        It must be one that does no harm if it is carried out twice, or late.
        """
        if self.dialect == "sqlite":
            await self.write(lambda connection: connection.execute(statement))
            return

        async def attempt(_: list[bool]) -> None:
            async with self._reader.connect() as connection:
                await connection.execute(statement)

        await self._within(WRITE_SECONDS, attempt)

    async def change_at_once(
        self, statement: Statement, values: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """Execute a *statement* of PostgreSQL in one round trip; return its rows.

        It must do no harm if it is carried out twice, or late.
        """
        return await self._run_at_once(self._changing, statement, values, WRITE_SECONDS)

    async def ask_at_once(
        self, statement: Statement, values: Mapping[str, Any], *, seconds: float = WRITE_SECONDS
    ) -> list[tuple[Any, ...]]:
        """Do so with one that waits for no lock, and so for none of `change_at_once`."""
        return await self._run_at_once(self._asking, statement, values, seconds)

    async def _run_at_once(
        self,
        connections: "DirectConnections | None",
        statement: Statement,
        values: Mapping[str, Any],
        seconds: float,
    ) -> list[tuple[Any, ...]]:
        if connections is None:
            raise TypeError(f"{self!r} has no round trips to save")
        return await self._within(seconds, lambda _: connections.run(statement, values))

    async def _read_with(
        self,
        engine: AsyncEngine,
        work: Callable[[AsyncConnection], Awaitable[T]],
        seconds: float | None = None,
    ) -> T:
        async def attempt(_: list[bool]) -> T:
            async with engine.connect() as connection:
                return await work(connection)

        return await self._within(seconds or READ_SECONDS, attempt)

    async def _within(self, seconds: float, attempt: Callable[[list[bool]], Awaitable[T]]) -> T:
        if self._file is not None:
            # Also for connections that were made before, which would go on with the old file.
            try:
                self._file.check()
            except sqlite3.OperationalError as error:
                raise _unavailable(error) from None
        task = asyncio.ensure_future(_retrying(attempt))
        self._running.add(task)
        task.add_done_callback(self._forget)
        try:
            # Not wait_for: that would wait for a frozen server to acknowledge the cancellation.
            await asyncio.wait({task}, timeout=seconds)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise Unavailable(f"the database did not answer within {seconds:g} s")
        if task.cancelled():  # by who cancels all tasks of a loop; nobody here did
            raise Unavailable("the query was cancelled")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not report work nobody waits for


async def _retrying(attempt: Callable[[list[bool]], Awaitable[T]]) -> T:
    for left in reversed(range(_ATTEMPTS)):
        committing: list[bool] = []
        try:
            return await attempt(committing)
        except PoolTimeout:
            raise Unavailable("all database connections are in use") from None
        except DBAPIError as error:
            if left and _may_be_tried_again(error, committing=bool(committing)):
                continue
            raise _unavailable(error) from None
        except (SQLAlchemyError, OSError) as error:
            raise _unavailable(error) from None
    raise AssertionError("the last attempt returns or raises")  # pragma: no cover


def _may_be_tried_again(error: DBAPIError, *, committing: bool) -> bool:
    if error.connection_invalidated:
        # Lost while committing, nobody knows whether it took place.
        return not committing
    return getattr(error.orig, "sqlstate", None) in _TRANSIENT_SQLSTATES


def _unavailable(error: Exception) -> GuardError:
    cause = getattr(error, "orig", None) or error
    first_line = next(iter(str(cause).splitlines()), "")
    return Unavailable(f"database: {type(cause).__name__}: {first_line}")


def _sqlite_engine(url: Any, pool_size: int, *, reading: bool, file: SqliteFile) -> AsyncEngine:
    engine = create_async_engine(
        url.set(database=str(file.path)),
        # SQLite lets one connection write at a time: queueing for it here is fair, in SQLite not.
        pool_size=pool_size if reading else 1,
        max_overflow=0,
        pool_timeout=_POOL_SECONDS if reading else WRITE_SECONDS,
        connect_args={
            "timeout": READ_SECONDS if reading else WRITE_SECONDS,
            "async_creator_fn": partial(_connect_sqlite, file),
        },
        # Where each statement commits by itself there is nothing to roll back, and a poll need not
        # wake the connection's thread to be told so. Whoever writes begins transactions itself.
        skip_autocommit_rollback=reading,
        hide_parameters=True,
    )

    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    if not reading:
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _sqlite_thread_engine(file: SqliteFile) -> Engine:
    """Return an engine for use in threads, which connects anew for each transaction."""

    def connect() -> sqlite3.Connection:
        file.check()
        return sqlite3.connect(file.path, timeout=WRITE_SECONDS)

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # no implicit BEGIN: see below
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # The default in WAL mode may lose the last commits, and so a revocation, at a power cut.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes can fail where one that takes the write lock
    # at once just waits.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _write(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


async def _connect_sqlite(file: SqliteFile, *args: Any, **options: Any) -> aiosqlite.Connection:
    file.check()
    connection = aiosqlite.connect(*args, **options)
    file.connections.add(connection)
    thread = connection._thread  # noqa: SLF001  # there is no other way to it
    thread.daemon = True
    try:
        return await connection
    except BaseException:
        # Where it cannot connect, aiosqlite tells its thread to end and does not wait for that:
        # left alone, the thread may find the event loop closed and print a traceback.
        await asyncio.to_thread(thread.join)
        raise


def _end_connections(connections: Iterable[aiosqlite.Connection]) -> None:
    """Close *connections* whose event loop has ended, which they cannot tell any more."""
    for connection in list(connections):
        connection.stop()
        connection._thread.join(WRITE_SECONDS)  # noqa: SLF001  # it closes, unless it had died
        raw = connection._connection  # noqa: SLF001  # none if closed
        if raw is not None:
            raw.close()


def _postgresql_engine(url: Any, pool_size: int, *, reading: bool) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_POOL_SECONDS if reading else WRITE_SECONDS,
        connect_args=_POSTGRESQL,
        hide_parameters=True,
        # Whatever the server's default: above this, changes for different accounts would fail each
        # other at the head of the feed, where they need only wait.
        isolation_level="AUTOCOMMIT" if reading else "READ COMMITTED",
    )


def _direct(url: URL, *, most: int) -> "DirectConnections":
    from tfm_guard.store.direct import DirectConnections  # noqa: PLC0415  # needs the driver

    dialect: Any = PGDialectAsync_psycopg  # it has no annotations
    _, options = dialect().create_connect_args(url)
    return DirectConnections(options | _POSTGRESQL, most=most)
