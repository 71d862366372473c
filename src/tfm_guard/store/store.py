"""The store as the other parts see it."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache, partial
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Interval,
    Select,
    Text,
    any_,
    bindparam,
    func,
    literal,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.clock import Clock
from tfm_guard.records import Account, Actor, ApiKey, AuditEvent, AuditRow, Change, StoredKey, Tally
from tfm_guard.store import audit, feed, revoking, schema, signs, upgrade, usage
from tfm_guard.store.database import Database
from tfm_guard.store.feed import FeedState, Place, Register
from tfm_guard.store.inspection import Look, find_faults, look, prune_audit, prune_changes
from tfm_guard.store.measuring import Room, Sample, count_room, sample_keys, time_flush
from tfm_guard.store.schema import UtcDateTime
from tfm_guard.store.signs import HourOfUse, Said, Turn
from tfm_guard.store.times import Times, change_times, read_times, require_times, strike_all_off
from tfm_guard.store.transaction import (
    ERASED_ACCOUNT,
    Holding,
    Transaction,
    counts_for_plan,
    granted,
    is_active,
    key_of,
    read_holdings,
)
from tfm_guard.store.usage import UsageHour

T = TypeVar("T")

_CHECKING_SECONDS: Final = 600.0
_PRUNED_AT_ONCE: Final = 10_000  # so that no transaction takes long

# For one transaction: how long it may wait for a lock, and how long a writer that stalls with
# locks held keeps others waiting. Both end below the deadline of a write.
_LIMITS: Final = text(
    "SELECT clock_timestamp() AS now, "
    "set_config('lock_timeout', '1500ms', true), "
    "set_config('statement_timeout', '4s', true), "
    "set_config('idle_in_transaction_session_timeout', '4s', true)"
)


class Installation(NamedTuple):
    """What was made together with the tables."""

    id: str
    root_secret: bytes
    tag_key: bytes
    lease: float  # seconds that a read of the feed, or an answer on the link, counts
    unfed: float  # seconds after the last read of the feed that the link alone counts
    poll_interval: float  # seconds, while there is no link
    linked_poll_interval: float  # seconds, while there is one


class Store:
    """Keys, accounts, the audit log and the feed of changes, in the database at *url*."""

    def __init__(self, url: str, *, pool_size: int, clock: Clock) -> None:
        self._database = Database(url, pool_size=pool_size)
        self._clock = clock
        self._on_commit: Callable[[Change], None] = lambda _: None
        self._times: Times | None = None  # as they were when this process opened the database

    def __repr__(self) -> str:
        return f"Store({self._database.dialect})"

    async def open(self) -> Installation:
        """Make the tables if there are none, and return what came with them.

        Raises `SchemaError` if the tables are of another release, `Unavailable` if the database
        cannot be reached.
        """
        await upgrade.ensure_schema(self._database)
        installation, self._times = await self._database.read(_read_installation)
        return installation

    async def upgrade(self) -> tuple[str | None, str]:
        """Bring the tables to this release; return their revision before and after."""
        return await upgrade.upgrade(self._database)

    async def close(self) -> None:
        await self._database.close()

    def leave(self) -> None:
        """Let go of what the event loop that it was used in, and that has ended, left open."""
        self._database.leave()

    async def look(self) -> Look | None:
        """Return what the database looks like; none if its file does not exist. Makes nothing."""
        if not self._database.has_file():
            return None
        self._database.adopt_file()
        return await self._database.read(lambda c: look(c, self._now()))

    async def find_faults(self) -> list[str]:
        """Return, in words, everything in the tables that cannot be so. `look` first."""
        return await self._database.read(
            lambda c: find_faults(c, self._now()), seconds=_CHECKING_SECONDS
        )

    async def prune_changes(self, older_than: timedelta) -> int:
        """Remove the changes that are older; return how many. `look` first."""
        return await self._prune_with(prune_changes, older_than)

    async def prune_audit(self, older_than: timedelta) -> int:
        """Remove the rows of the audit log that are older; return how many. `look` first."""
        return await self._prune_with(prune_audit, older_than)

    async def _prune_with(
        self,
        prune: Callable[[AsyncConnection, datetime, int], Awaitable[int]],
        older_than: timedelta,
    ) -> int:
        async def run(connection: AsyncConnection) -> int:
            before = await self._begin(connection) - older_than
            return await prune(connection, before, _PRUNED_AT_ONCE)

        removed = 0
        while more := await self._database.write(run):
            removed += more
        return removed

    async def find_keys(self, prefixes: Iterable[str]) -> dict[str, StoredKey]:
        """Return the rows of those *prefixes* that exist, by prefix."""
        wanted = list(prefixes)

        async def work(connection: AsyncConnection) -> dict[str, StoredKey]:
            read_at = self._now().label("read_at")
            statement = _find_keys(self._database.dialect).add_columns(read_at)
            rows = await connection.execute(statement, {"prefixes": wanted})
            return {key.prefix: key for key in map(_stored_key, rows)}

        return await self._database.read(work)

    async def list_keys(self, account_id: str) -> list[ApiKey]:
        """Return the account's active keys, newest first."""
        keys = schema.keys.c
        wanted = _ACTIVE_KEYS.where(
            keys.account_id == account_id, *is_active(self._now())
        ).order_by(keys.created_at.desc(), keys.id.desc())
        rows = await self._database.read(lambda connection: connection.execute(wanted))
        return [key_of(row, row.last_used_at) for row in rows]

    async def list_unconfirmed(self, account_id: str) -> list[ApiKey]:
        """Return the account's keys that are revoked, and not yet known to be refused everywhere.

        The latest first.
        """
        keys = schema.keys.c
        wanted = _ACTIVE_KEYS.where(
            keys.account_id == account_id, keys.revoked_at.is_not(None), keys.confirmed_at.is_(None)
        ).order_by(keys.revoked_at.desc(), keys.id)
        rows = await self._database.read(lambda connection: connection.execute(wanted))
        return [key_of(row, row.last_used_at) for row in rows]

    async def get_key(self, account_id: str, key_id: UUID) -> ApiKey | None:
        """Return the account's key, if it is active."""
        keys = schema.keys.c
        wanted = _ACTIVE_KEYS.where(
            keys.id == key_id, keys.account_id == account_id, *is_active(self._now())
        )
        rows = await self._database.read(lambda connection: connection.execute(wanted))
        row = rows.one_or_none()
        return None if row is None else key_of(row, row.last_used_at)

    async def list_accounts(self, account_id: str | None = None) -> list[Account]:
        """Return all accounts by their ids, or only the one with *account_id*, if it exists."""
        accounts, keys = schema.accounts.c, schema.keys.c
        active = (
            select(func.count())
            .where(keys.account_id == accounts.id, *counts_for_plan(self._now()))
            .scalar_subquery()
        )
        wanted = (
            select(schema.accounts, active.label("active_keys"))
            .where(accounts.id != ERASED_ACCOUNT)
            .order_by(accounts.id)
        )
        if account_id is not None:
            wanted = wanted.where(accounts.id == account_id)
        rows = await self._database.read(lambda connection: connection.execute(wanted))
        return [Account(**row._asdict()) for row in rows]

    async def newest_audit_rows(
        self, account_id: str, *, within: timedelta, where: Mapping[str, str], limit: int
    ) -> tuple[list[AuditRow], int]:
        """Return up to *limit* rows of the account's last *within*, and how many there are."""
        since = self._ago(within)
        return await self._database.read(
            lambda c: audit.newest(c, account_id, since=since, where=where, limit=limit)
        )

    async def audit_rows_after(
        self, after: int, *, account_id: str | None, limit: int
    ) -> list[AuditEvent]:
        """Return up to *limit* rows of the audit log with ids above *after*, in their order."""
        return await self._database.read(
            lambda c: audit.following(c, after, account_id=account_id, limit=limit)
        )

    async def active_keys(self, after: UUID, limit: int) -> list[ApiKey]:
        """Return up to *limit* active keys of all accounts, those with ids above *after*."""
        return await self._database.read(lambda c: signs.active_keys(c, after, limit, self._now()))

    async def use_in(self, key_ids: Collection[UUID], hours: Iterable[int]) -> list[HourOfUse]:
        """Return what the keys were used for in these *hours*, where they were used at all."""
        return await self._database.read(lambda c: signs.use_in(c, key_ids, hours))

    async def use_since(self, key_id: UUID, hour: int) -> tuple[list[HourOfUse], int]:
        """Return what a key was used for from an *hour* on, and the first that it ever was."""
        return await self._database.read(lambda c: signs.use_since(c, key_id, hour))

    async def signs_said(self, key_ids: Collection[UUID]) -> list[Said]:
        """Return what was last said of these keys."""
        return await self._database.read(lambda c: signs.said(c, key_ids))

    async def claim_look(self, last_hour: Callable[[datetime], int]) -> tuple[bool, datetime]:
        """Claim the *last_hour* at the database's time; tell whether it was free, and the time."""

        async def claim(transaction: Transaction) -> tuple[bool, datetime]:
            return await Turn(transaction).claim(last_hour(transaction.now)), transaction.now

        claimed, _ = await self.transact(claim)
        return claimed

    async def read_holdings(self, account_ids: Iterable[str]) -> list[Holding]:
        """Return the plan of each account, and how many active keys it holds."""
        wanted = list(account_ids)
        return await self._database.read(lambda c: read_holdings(c, wanted, self._now()))

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> tuple[T, list[Change]]:
        """Run *work* in a transaction that appends its changes to the feed, and commit it.

        Returns what *work* returned and the changes, of which `on_commit`'s listener then knows.
        *work* may run again from the start after a conflict with another transaction, so it must
        do nothing but call the transaction.
        """

        async def run(connection: AsyncConnection) -> tuple[T, list[Change]]:
            transaction = Transaction(connection, await self._begin(connection))
            result = await work(transaction)
            await transaction.append_changes()
            return result, transaction.changes

        result, changes = await self._database.write(run)
        for change in changes:
            self._on_commit(change)
        return result, changes

    def on_commit(self, listener: Callable[[Change], None]) -> None:
        """Call *listener* with every change that this process has just committed."""
        self._on_commit = listener

    async def register_worker(self, worker_id: UUID, name: str) -> None:
        """Enter a process that is about to cache into the register.

        Raises `Unavailable` also where the times that all processes share are others than those
        that it opened the database with.
        """

        async def run(connection: AsyncConnection) -> None:
            await feed.register(connection, worker_id, name, await self._begin(connection))
            if self._times is not None:
                # Behind that, they cannot change any more (`change_times`).
                await require_times(connection, self._times)

        await self._database.write(run)

    async def shared_times(self) -> Times:
        """Return the times that all processes share. `look` first."""
        return await self._database.read(read_times)

    async def strike_all_off(self) -> bool:
        """Strike all processes off the register; tell whether there were any. `look` first.

        One that lives may go on trusting its memory for `unfed` seconds.
        """

        async def run(connection: AsyncConnection) -> bool:
            await self._begin(connection)
            return await strike_all_off(connection)

        return await self._database.write(run)

    async def change_times(self, times: Times) -> list[str]:
        """Set the times that all processes share, unless some are in the register. `look` first.

        Then their names are returned. Those struck off do not count: of them, none may be left that
        trusts its memory.
        """

        async def run(connection: AsyncConnection) -> list[str]:
            await self._begin(connection)
            return await change_times(connection, times)

        return await self._database.write(run)

    async def sample_keys(self) -> Sample:
        """Look at some keys. `look` first."""
        return await self._database.read(sample_keys)

    async def count_room(self) -> Room | None:
        """Return what room the database has for connections; none if for any number."""
        return await self._database.read(count_room)

    async def time_flush(self, keys: int) -> float:
        """Return the seconds that the statements of a flush for so many keys take.

        In a transaction that is rolled back: what the commit takes is not in it. `look` first.
        """
        hour = int(self._clock.now().timestamp()) // 3600
        tallies = [Tally(uuid4().bytes, hour, 1, 0, hour * 3600.0) for _ in range(keys)]
        rows = await usage.rows_of(tallies, self._database.dialect)

        def run(connection: Connection) -> float:
            self._begin_usage(connection)
            return time_flush(connection, tallies, rows, self._clock.monotonic)

        return await self._database.write_usage(run)

    async def unregister_worker(self, worker_id: UUID) -> None:
        """Strike a process that has ceased to cache off the register."""
        await self._database.write(lambda connection: feed.unregister(connection, worker_id))

    async def poll(self, worker_id: UUID, place: Place) -> FeedState | None:
        """Return the state of the feed; none if the process is not in the register (any more).

        On PostgreSQL this also records the *place* of the process: a server that cannot be written
        to, and so may be stale, fails it. SQLite has one file and one writer at a time, so there
        it is a read.
        """

        async def run(connection: AsyncConnection) -> FeedState | None:
            if self._database.dialect == "sqlite":
                return await feed.state(connection, worker_id, self._clock.now())
            return await feed.state_and_record(connection, worker_id, place)

        return await self._database.read_feed(run)

    async def record_place(self, worker_id: UUID, place: Place) -> None:
        """Record the *place* of the process."""
        # Not in a transaction: one that stops in the middle of it would keep its row locked, and so
        # hold up whoever strikes it off.
        await self._database.write_one(feed.record(worker_id, place))

    async def read_register(self) -> Register:
        """Return the registered processes, and how far the feed had come."""
        if self._database.dialect == "postgresql":
            return await revoking.read_register_at_once(self._database)
        return await self._database.read(feed.read_register)

    async def strike_off(
        self, silent: Iterable[UUID], seen: int, *, marked: Iterable[UUID]
    ) -> None:
        """Mark those of *silent* that have still not seen *seen*; remove the *marked* ones."""

        async def run(connection: AsyncConnection) -> None:
            await self._begin(connection)
            await feed.strike_off(connection, silent, seen, marked)

        await self._database.write(run)

    async def changes_between(self, seen: int, head: int) -> list[Change]:
        """Return the changes after *seen* up to *head*, in their order."""
        return await self._database.read_feed(lambda c: feed.changes_between(c, seen, head))

    async def recent_changes(self, state: FeedState, seconds: float) -> list[Change]:
        """Return the changes of the last *seconds* before *state*, in their order.

        Each query reads a page of them: after an import there may be millions.
        """
        moment, changes = state.now - timedelta(seconds=seconds), list[Change]()
        while True:
            after = changes[-1].id if changes else 0
            read = partial(feed.changes_since, moment=moment, after=after)
            page = await self._database.read_feed(read)
            changes += page
            if len(page) < feed.PAGE:
                return changes

    async def revoke_key(self, account_id: str, key_id: UUID, actor: str | Actor) -> Change | None:
        """Revoke the account's key for good, unless it was revoked before; return the change.

        Of a key that was revoked before, a change that nobody has seen who does not know of that.
        None if there is no such key, or its revocation was confirmed. Raises `Unavailable` where
        the key is not known to be revoked.
        """
        who = Actor.of(actor)
        if self._database.dialect == "sqlite":
            earlier, changes = await self.transact(
                lambda transaction: revoking.revoke(transaction, account_id, key_id, who)
            )
            return earlier or next(iter(changes), None)
        change, new = await revoking.revoke_at_once(self._database, account_id, key_id, who)
        if change is not None and new:
            self._on_commit(change)
        return change

    async def confirm_revocation(self, key_id: UUID) -> None:
        """Record that the revocation of a key has been shown to hold everywhere."""
        if self._database.dialect == "postgresql":
            await revoking.confirm_at_once(self._database, key_id)
            return
        confirm = (
            update(schema.keys)
            .where(schema.keys.c.id == key_id)
            .values(confirmed_at=self._clock.now())
        )
        await self._database.write(lambda connection: connection.execute(confirm))

    async def set_digest(self, key_id: UUID, digest: bytes, digest_key_id: str) -> None:
        """Store the digest of a key that was proven by its slow hash. Its state stays as it is."""

        async def run(connection: AsyncConnection) -> None:
            await self._begin(connection)
            await connection.execute(
                update(schema.keys)
                # Of one that was erased meanwhile, nothing more is kept.
                .where(schema.keys.c.id == key_id, schema.keys.c.account_id != ERASED_ACCOUNT)
                .values(digest=digest, digest_key_id=digest_key_id)
            )

        await self._database.write(run)

    async def add_usage(self, flush_id: UUID, tallies: Sequence[Tally]) -> None:
        """Add *tallies* to the usage of their keys, but for those that there are no more.

        What was added under the same *flush_id* before is not added again. Raises `Unavailable`
        where it is not known to have been added.
        """
        rows = await usage.rows_of(tallies, self._database.dialect)

        def run(connection: Connection) -> None:
            usage.add(connection, flush_id, rows, self._begin_usage(connection))

        await self._database.write_usage(run)

    async def read_usage(
        self, account_id: str, key_id: UUID, span: timedelta
    ) -> tuple[datetime, list[UsageHour]] | None:
        """Return the database's time and the hours of the account's key in the *span* before.

        None if the account never had such a key.
        """
        return await self._database.read(
            lambda connection: usage.read(connection, account_id, key_id, span, self._now())
        )

    async def read_usage_of(
        self, key_ids: Collection[UUID], span: timedelta
    ) -> tuple[datetime, dict[UUID, list[UsageHour]]]:
        """Return the database's time and the hours of each of *key_ids* in the *span* before."""
        return await self._database.read(
            lambda connection: usage.read_all(connection, key_ids, span, self._now())
        )

    async def prune_usage(self) -> int:
        """Remove hours of more than 92 days ago and ids of flushes of yesterday; return how many.

        In short transactions, so that changes go on meanwhile.
        """
        clock = select(self._now())
        moment = (await self._database.read(lambda c: c.execute(clock))).scalar_one()
        removed = 0
        for statement in usage.prunings(moment):
            while count := await self._prune(statement):
                removed += count
        return removed

    async def _prune(self, statement: Delete) -> int:
        def run(connection: Connection) -> int:
            self._begin_usage(connection)
            return connection.execute(statement).rowcount

        return await self._database.write_usage(run)

    def _begin_usage(self, connection: Connection) -> datetime:
        if self._database.dialect == "sqlite":
            return self._clock.now()
        now: datetime = connection.execute(_LIMITS).scalar_one()
        return now

    async def _begin(self, connection: AsyncConnection) -> datetime:
        if self._database.dialect == "sqlite":
            return self._clock.now()
        now: datetime = (await connection.execute(_LIMITS)).scalar_one()
        return now

    def _ago(self, length: timedelta) -> ColumnElement[datetime]:
        if self._database.dialect == "sqlite":
            return literal(self._clock.now() - length, UtcDateTime())
        return type_coerce(self._now() - literal(length, Interval()), UtcDateTime())

    def _now(self) -> ColumnElement[datetime]:
        # SQLite has no time but this machine's; PostgreSQL's is one for all processes.
        if self._database.dialect == "sqlite":
            return literal(self._clock.now(), UtcDateTime())
        return func.clock_timestamp(type_=UtcDateTime())


_ACTIVE_KEYS: Final = select(schema.keys, schema.key_usage.c.last_used_at).outerjoin(
    schema.key_usage, schema.key_usage.c.key_id == schema.keys.c.id
)


@cache
def _find_keys(dialect: str) -> Select[Any]:
    """Return what finds keys by their *prefixes*.

    In the order of the fields, but for the last, which `Store.find_keys` adds: the time of reading.
    """
    keys = schema.keys.c
    condition: ColumnElement[bool] = keys.prefix.in_(bindparam("prefixes", expanding=True))
    if dialect == "postgresql":
        # One parameter instead of one for each: of hundreds, that is half the work on both sides.
        condition = keys.prefix == any_(bindparam("prefixes", type_=postgresql.ARRAY(Text)))
    return (
        select(
            *(keys[field] for field in StoredKey._fields if field in keys),
            schema.accounts.c.suspended_at,
        )
        .join(schema.accounts, schema.accounts.c.id == keys.account_id)
        .where(condition)
    )


async def _read_installation(connection: AsyncConnection) -> tuple[Installation, Times]:
    secrets = {row.name: row.value for row in await connection.execute(select(schema.secrets))}
    shared = {row.name: row.value for row in await connection.execute(select(schema.settings))}
    times = Times(*(float(shared[name]) for name in Times._fields))
    installation = Installation(
        id=shared["installation_id"],
        root_secret=secrets["root"],
        tag_key=secrets["tag"],
        lease=times.lease_seconds,
        unfed=times.unfed_seconds,
        poll_interval=times.poll_seconds,
        linked_poll_interval=times.linked_poll_seconds,
    )
    return installation, times


_SCOPES: Final = StoredKey._fields.index("scopes")


def _stored_key(row: Any) -> StoredKey:
    return StoredKey._make((*row[:_SCOPES], granted(row[_SCOPES]), *row[_SCOPES + 1 :]))
