"""The database as plain tables, and the store that reaches it over the network.

`test_faithful.py` shows that the same calls on this store and on the real one get the same answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from tests.simulation.network import Network, Postponed
from tests.simulation.timeline import START, Timeline
from tfm_guard.errors import Unavailable
from tfm_guard.records import Actor, ApiKey, Change, ChangeKind, StoredKey, Tally
from tfm_guard.store import (
    MARKED,
    FeedState,
    Holding,
    Installation,
    LockedAccount,
    LockedKey,
    Member,
    Place,
    PrefixTaken,
    Register,
    revoking,
)
from tfm_guard.store.database import READ_SECONDS, WRITE_SECONDS

if TYPE_CHECKING:
    from tests.simulation.process import Process

T = TypeVar("T")


@dataclass(kw_only=True)
class KeyRow:
    """A row of the table of keys."""

    id: UUID
    account_id: str
    name: str
    prefix: str
    secret_hash: str
    digest: bytes | None
    digest_key_id: str | None
    scopes: frozenset[str]
    version: int
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    replaced_by: UUID | None = None
    replaced_at: datetime | None = None
    revoked_at: datetime | None = None
    confirmed_at: datetime | None = None


@dataclass
class WorkerRow:
    """A row of the register."""

    name: str
    seen: int = 0
    link: str | None = None
    turn: int = 0


@dataclass
class Tables:
    """All that is in a database."""

    keys: dict[str, KeyRow] = field(default_factory=dict)  # by prefix
    as_created: dict[str, KeyRow] = field(default_factory=dict)  # by prefix
    plans: dict[str, str] = field(default_factory=dict)  # by account
    suspended: dict[str, datetime] = field(default_factory=dict)  # by account: since when
    workers: dict[UUID, WorkerRow] = field(default_factory=dict)
    changes: list[tuple[Change, datetime]] = field(default_factory=list)
    head: int = 0
    sequence: int = 0  # numbers given out by a break, before the commit
    audit: list[tuple[str, UUID]] = field(default_factory=list)
    flushes: set[UUID] = field(default_factory=set)
    last_used: dict[UUID, float] = field(default_factory=dict)  # seconds since 1970
    accepted: dict[UUID, int] = field(default_factory=dict)  # in all hours
    # Whether a key that is inserted comes without a digest, as those from elsewhere do.
    imports: Callable[[], bool] = lambda: False

    def key(self, key_id: UUID) -> KeyRow | None:
        """Return the key with that id."""
        return next((row for row in self.keys.values() if row.id == key_id), None)

    def is_replaced(self, row: KeyRow, now: datetime) -> bool:
        """Tell whether another active key takes the place of that one."""
        successor = None if row.replaced_by is None else self.key(row.replaced_by)
        return successor is not None and is_active(successor, now)

    def count_active(self, account_id: str, now: datetime) -> int:
        """Count the keys of the account that the plan counts."""
        return sum(
            row.account_id == account_id and is_active(row, now) and not self.is_replaced(row, now)
            for row in self.keys.values()
        )


class SimTransaction:
    """A transaction begun at *now*, whose effects all take place at its end, or never."""

    def __init__(self, tables: Tables, now: datetime) -> None:
        self.now = now
        self.changes: list[Change] = []
        self._tables = tables
        self._pending: list[tuple[ChangeKind, str, int]] = []
        self._effects: list[Callable[[], None]] = []
        self._number = 0  # of its change, if it was taken before the commit

    async def lock_account(self, account_id: str) -> LockedAccount:
        plans, suspended = self._tables.plans, self._tables.suspended
        self._effects.append(lambda: plans.update({account_id: plans.get(account_id, "free")}))
        plan = plans.get(account_id, "free")
        return LockedAccount(account_id, plan, suspended.get(account_id))

    async def lock_known_account(self, account_id: str) -> LockedAccount | None:
        return await self.lock_account(account_id) if account_id in self._tables.plans else None

    async def set_plan(self, account_id: str, plan: str) -> None:
        self._effects.append(lambda: self._tables.plans.update({account_id: plan}))

    async def count_active_keys(self, account_id: str) -> int:
        return self._tables.count_active(account_id, self.now)

    async def active_scopes(self, account_id: str, key_id: UUID) -> frozenset[str] | None:
        row = self._tables.key(key_id)
        if row is None or row.account_id != account_id or not is_active(row, self.now):
            return None
        return None if account_id in self._tables.suspended else row.scopes

    async def insert_key(self, key: ApiKey, **columns: Any) -> None:
        if key.key_prefix in self._tables.keys:
            raise PrefixTaken
        row = KeyRow(
            id=key.id,
            account_id=key.account_id,
            name=key.name,
            prefix=key.key_prefix,
            scopes=key.scopes,
            version=1,
            created_at=key.created_at,
            expires_at=key.expires_at,
            **columns,
        )
        if self._tables.imports():
            row.digest = row.digest_key_id = None
        self._effects.append(lambda: self._tables.keys.update({row.prefix: row}))
        self._effects.append(lambda: self._tables.as_created.update({row.prefix: replace(row)}))
        self._pending.append(("created", key.key_prefix, 1))

    async def lock_key(self, account_id: str, key_id: UUID) -> LockedKey | None:
        row = self._tables.key(key_id)
        if row is None or row.account_id != account_id:
            return None
        return LockedKey(*(getattr(row, name) for name in LockedKey._fields))

    async def change_key(self, kind: ChangeKind, key: LockedKey, **values: Any) -> None:
        self._change(kind, self._tables.keys[key.prefix], version=key.version + 1, **values)

    def _change(self, kind: ChangeKind, row: KeyRow, *, version: int, **values: Any) -> None:
        self._effects.append(lambda: vars(row).update(values, version=version))
        self._pending.append((kind, row.prefix, version))

    def _of(self, account_id: str) -> list[KeyRow]:
        rows = (row for row in self._tables.keys.values() if row.account_id == account_id)
        return sorted(rows, key=lambda row: row.prefix)

    async def change_active_keys(self, kind: ChangeKind, account_id: str) -> None:
        for row in self._of(account_id):
            if is_active(row, self.now):
                self._change(kind, row, version=row.version + 1)

    async def states(self, account_id: str, *, kind: ChangeKind) -> list[Change]:
        past = self.now - timedelta(minutes=20)
        rows = (
            row
            for row in self._of(account_id)
            if row.confirmed_at is None and (row.revoked_at is not None or is_active(row, past))
        )
        return [Change(self._tables.head, kind, row.prefix, row.version) for row in rows]

    async def suspend_account(self, account_id: str, suspended_at: datetime | None) -> None:
        suspended = self._tables.suspended
        if suspended_at is None:
            self._effects.append(lambda: _drop(suspended, account_id))
        else:
            self._effects.append(lambda: suspended.update({account_id: suspended_at}))

    async def has_active_predecessor(self, account_id: str, key_id: UUID) -> bool:
        rows = self._of(account_id)
        return any(row.replaced_by == key_id and is_active(row, self.now) for row in rows)

    async def last_used_at(self, key_id: UUID) -> datetime | None:
        return _moment(self._tables.last_used.get(key_id))

    async def head(self) -> int:
        return self._tables.head

    async def audit(self, *, action: str, target_id: UUID, **_: Any) -> None:
        self._effects.append(lambda: self._tables.audit.append((action, target_id)))

    def commit(self) -> None:
        """Have all effects take place, and number the changes in the same moment."""
        for effect in self._effects:
            effect()
        for change in self._pending:
            number = self._number or self._tables.head + 1
            self._tables.head = max(number, self._tables.head)
            self.changes.append(Change(number, *change))
            self._tables.changes.append((self.changes[-1], self.now))


def is_active(row: KeyRow, now: datetime) -> bool:
    """Tell whether a key is neither revoked nor expired at *now*."""
    return row.revoked_at is None and (row.expires_at is None or row.expires_at > now)


class SimDatabase:
    """One database: each request is executed at one moment, in the order in which they arrive."""

    def __init__(self, timeline: Timeline, installation: Installation, *, dialect: str) -> None:
        self.tables = Tables()
        self.on_registered: list[Callable[[], None]] = []
        self.up = True
        self.installation = installation
        self.on_commit: list[Callable[[list[Change]], None]] = []
        self.on_recorded: list[Callable[[UUID, int], None]] = []
        self.on_used: list[Callable[[Sequence[Tally]], None]] = []
        self.last_reads: dict[str, float] = {}  # when a key's row was last read, in seconds
        # Whether rows are read as they were, by processes that know of their later change.
        self.stale = False
        self.dialect = dialect
        self._timeline = timeline

    @property
    def now(self) -> datetime:
        """The database's own time."""
        return START + timedelta(seconds=self._timeline.now)

    def begin(self) -> SimTransaction:
        """Return a new transaction."""
        return SimTransaction(self.tables, self.now)

    def time_of_commit(self) -> float:
        """Return when a transaction that begins now comes to its COMMIT."""
        lag = self._timeline.random.choice((0.001, 0.001, 0.1, 1.0))
        return self._timeline.now + self._timeline.random.uniform(0, lag)

    def commit(self, transaction: SimTransaction) -> None:
        """Commit it."""
        transaction.commit()
        for listener in self.on_commit:
            listener(transaction.changes)

    def find_keys(self, process: "Process", prefixes: Iterable[str]) -> dict[str, StoredKey]:
        rows = [self.tables.keys[prefix] for prefix in prefixes if prefix in self.tables.keys]
        self.last_reads.update((row.prefix, self._timeline.now) for row in rows)
        return {row.prefix: self._stored(self._aged(process, row)) for row in rows}

    def _aged(self, process: "Process", row: KeyRow) -> KeyRow:
        if self.stale and row.version > 1 and process.floor(row.prefix) >= row.version:
            return self.tables.as_created[row.prefix]
        return row

    def _stored(self, row: KeyRow) -> StoredKey:
        columns = {name: getattr(row, name) for name in StoredKey._fields if hasattr(row, name)}
        suspended_at = self.tables.suspended.get(row.account_id)
        return StoredKey(**columns, suspended_at=suspended_at, read_at=self.now)

    def list_keys(self, account_id: str) -> list[ApiKey]:
        rows = (row for row in self.tables.keys.values() if row.account_id == account_id)
        active = [
            _api_key(row, self.tables.last_used.get(row.id))
            for row in rows
            if is_active(row, self.now)
        ]
        return sorted(active, key=lambda key: (key.created_at, key.id.hex), reverse=True)

    def register(self, worker_id: UUID, name: str) -> None:
        self.tables.workers[worker_id] = WorkerRow(name)
        for listener in self.on_registered:
            listener()

    def unregister(self, worker_id: UUID) -> None:
        self.tables.workers.pop(worker_id, None)

    def poll(self, worker_id: UUID, place: Place) -> FeedState | None:
        if self.dialect == "postgresql" and place.seen > self.tables.head:
            return None
        row = self.tables.workers.get(worker_id)
        if row is None or row.seen < 0:
            return None
        if self.dialect == "postgresql":
            self.record_place(worker_id, place)
        return FeedState(self.tables.head, self.now, row.turn)

    def record_place(self, worker_id: UUID, place: Place) -> None:
        row = self.tables.workers.get(worker_id)
        if row is not None and row.seen >= 0 and row.turn < place.turn:
            row.seen, row.link, row.turn = place
            for listener in self.on_recorded:
                listener(worker_id, place.seen)

    def read_register(self) -> Register:
        rows = self.tables.workers.items()
        members = {worker_id: Member(row.seen, row.link) for worker_id, row in rows}
        return Register(self.tables.head, members)

    def strike_off(self, silent: list[UUID], seen: int, marked: list[UUID]) -> None:
        workers = self.tables.workers
        for worker_id in marked:
            if worker_id in workers and workers[worker_id].seen == MARKED:
                del workers[worker_id]
        for worker_id in silent:
            if worker_id in workers and workers[worker_id].seen < seen:
                workers[worker_id].seen = MARKED

    def changes_between(self, seen: int, head: int) -> list[Change]:
        return [change for change, _ in self.tables.changes if seen < change.id <= head]

    def changes_since(self, moment: datetime) -> list[Change]:
        return [change for change, created_at in self.tables.changes if created_at > moment]

    def confirm(self, key_id: UUID) -> None:
        row = self.tables.key(key_id)
        if row is not None:
            row.confirmed_at = self.now

    def add_usage(self, flush_id: UUID, tallies: Sequence[Tally]) -> None:
        tables = self.tables
        known = {row.id for row in tables.keys.values()}
        if flush_id in tables.flushes:
            return
        tables.flushes.add(flush_id)
        for listener in self.on_used:
            listener(tallies)
        for tally in tallies:
            key_id = UUID(bytes=tally.key_id)
            if key_id not in known:
                continue
            tables.accepted[key_id] = tables.accepted.get(key_id, 0) + tally.accepted
            if tally.used_at is not None:
                last_used = tables.last_used.get(key_id, tally.used_at)
                tables.last_used[key_id] = max(last_used, tally.used_at)

    def set_digest(self, key_id: UUID, digest: bytes, digest_key_id: str) -> None:
        row = self.tables.key(key_id)
        if row is not None:
            row.digest, row.digest_key_id = digest, digest_key_id


class SimStore:
    """What one process has in the place of `Store`: the same calls, sent to a `SimDatabase`."""

    def __init__(self, process: "Process", database: SimDatabase, network: Network) -> None:
        self._process = process
        self._database = database
        self._network = network
        self._on_commit: Callable[[Change], None] = lambda _: None

    async def open(self) -> Installation:
        return await self._ask(READ_SECONDS, lambda: self._database.installation)

    async def close(self) -> None:
        """Do nothing: there are no connections to close."""

    async def find_keys(self, prefixes: Iterable[str]) -> dict[str, StoredKey]:
        wanted = list(prefixes)
        return await self._read(lambda: self._database.find_keys(self._process, wanted))

    async def list_keys(self, account_id: str) -> list[ApiKey]:
        return await self._read(lambda: self._database.list_keys(account_id))

    async def get_key(self, account_id: str, key_id: UUID) -> ApiKey | None:
        keys = await self.list_keys(account_id)
        return next((key for key in keys if key.id == key_id), None)

    async def read_holdings(self, account_ids: Iterable[str]) -> list[Holding]:
        tables, wanted = self._database.tables, list(account_ids)

        def run() -> list[Holding]:
            now = self._database.now
            return [
                Holding(one, tables.plans.get(one, "free"), tables.count_active(one, now))
                for one in wanted
            ]

        return await self._read(run)

    async def transact(self, work: Callable[[Any], Awaitable[T]]) -> tuple[T, list[Change]]:
        begun: list[SimTransaction] = []

        def run() -> tuple[T, list[Change]]:
            if not begun:
                begun.append(self._database.begin())
                raise Postponed(self._database.time_of_commit())
            result = _at_once(work(begun[0]))
            self._database.commit(begun[0])
            return result, begun[0].changes

        result, changes = await self._write(run)
        for change in changes:
            self._on_commit(change)
        return result, changes

    async def revoke_key(self, account_id: str, key_id: UUID, actor: str | Actor) -> Change | None:
        who = Actor.of(actor)
        earlier, changes = await self.transact(
            lambda transaction: revoking.revoke(transaction, account_id, key_id, who)
        )
        return earlier or next(iter(changes), None)

    def on_commit(self, listener: Callable[[Change], None]) -> None:
        self._on_commit = listener

    async def claim_look(self, _last_hour: Callable[[datetime], int]) -> tuple[bool, datetime]:
        return False, self._database.now  # nobody looks for signs of trouble here

    async def register_worker(self, worker_id: UUID, name: str) -> None:
        await self._write(lambda: self._database.register(worker_id, name))

    async def unregister_worker(self, worker_id: UUID) -> None:
        await self._write(lambda: self._database.unregister(worker_id))

    async def poll(self, worker_id: UUID, place: Place) -> FeedState | None:
        return await self._read(lambda: self._database.poll(worker_id, place))

    async def record_place(self, worker_id: UUID, place: Place) -> None:
        await self._write(lambda: self._database.record_place(worker_id, place))

    async def head(self) -> FeedState:
        """Do what the real store does not: read the feed for who is not in the register."""
        tables = self._database.tables
        return await self._read(lambda: FeedState(tables.head, self._database.now, 0))

    async def read_register(self) -> Register:
        return await self._read(self._database.read_register)

    async def strike_off(
        self, silent: Iterable[UUID], seen: int, *, marked: Iterable[UUID]
    ) -> None:
        first, second = list(silent), list(marked)
        await self._write(lambda: self._database.strike_off(first, seen, second))

    async def changes_between(self, seen: int, head: int) -> list[Change]:
        return await self._read(lambda: self._database.changes_between(seen, head))

    async def recent_changes(self, state: FeedState, seconds: float) -> list[Change]:
        moment = state.now - timedelta(seconds=seconds)
        return await self._read(lambda: self._database.changes_since(moment))

    async def confirm_revocation(self, key_id: UUID) -> None:
        await self._write(lambda: self._database.confirm(key_id))

    async def set_digest(self, key_id: UUID, digest: bytes, digest_key_id: str) -> None:
        await self._write(lambda: self._database.set_digest(key_id, digest, digest_key_id))

    async def add_usage(self, flush_id: UUID, tallies: Sequence[Tally]) -> None:
        await self._write(lambda: self._database.add_usage(flush_id, tallies))

    async def _read(self, execute: Callable[[], T]) -> T:
        return await self._ask(READ_SECONDS, execute)

    async def _write(self, execute: Callable[[], T]) -> T:
        return await self._ask(WRITE_SECONDS, execute)

    async def _ask(self, seconds: float, execute: Callable[[], T]) -> T:
        def if_up() -> T:
            if not self._database.up:
                raise ConnectionResetError("the database is down")
            return execute()

        try:
            async with asyncio.timeout(seconds):
                return await self._network.ask(self._process, "database", if_up)
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"database: {error!r}") from None


def _at_once(work: Awaitable[T]) -> T:
    """Run what never waits to its end."""
    try:
        next(work.__await__())
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("a transaction waited for something that is no statement of its own")


def _api_key(row: KeyRow, last_used: float | None) -> ApiKey:
    return ApiKey(
        id=row.id,
        key_prefix=row.prefix,
        account_id=row.account_id,
        name=row.name,
        scopes=row.scopes,
        created_at=row.created_at,
        last_used_at=_moment(last_used),
        expires_at=row.expires_at,
        replaced_by=row.replaced_by,
    )


def _drop(values: dict[str, Any], name: str) -> None:
    values.pop(name, None)


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
