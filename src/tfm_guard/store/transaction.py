"""The statements that a change is made of."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Insert,
    Row,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.errors import GuardError
from tfm_guard.records import SECURITY, Actor, ApiKey, Change, ChangeKind, TargetType
from tfm_guard.store import feed, schema

# Whose the prefixes are that must stay taken. No account has this id: it is empty.
ERASED_ACCOUNT: Final = ""


class PrefixTaken(GuardError):
    """A key with this prefix exists already; mint another."""


class LockedAccount(NamedTuple):
    """An account as the database knows it."""

    id: str
    plan: str
    suspended_at: datetime | None


class LockedKey(NamedTuple):
    """A key as the database knows it, revoked or not."""

    id: UUID
    prefix: str
    account_id: str
    name: str
    scopes: frozenset[str]
    version: int
    created_at: datetime
    expires_at: datetime | None
    replaced_by: UUID | None
    replaced_at: datetime | None
    revoked_at: datetime | None
    confirmed_at: datetime | None


class NewKey(NamedTuple):
    """A key to insert: *digest*, under the key with that id, is none if nobody knows its token."""

    key: ApiKey
    secret_hash: str
    digest: bytes | None
    digest_key_id: str | None
    created_by: str


class Holding(NamedTuple):
    """An account's plan, and how many keys it holds that are neither revoked nor expired."""

    account_id: str
    plan: str
    active: int


class Transaction:
    """An open transaction at *now*, the database's time. Committed by who opened it."""

    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        self._connection = connection
        self._pending: list[tuple[ChangeKind, str, int]] = []
        self._writes: dict[Update, dict[str, Any]] = {}
        self._audited: list[dict[str, Any]] = []
        self._is_postgresql = connection.dialect.name == "postgresql"
        self.changes: list[Change] = []
        self.now = now
        self.connection = connection  # for this package's other modules

    async def lock_account(self, account_id: str) -> LockedAccount:
        """Return the account, made and put on the plan "free" if it is new, and hold it.

        All that changes an account's keys takes this lock first, and so happens one by one.
        """
        account = await self.lock_known_account(account_id)
        if account is None:
            dialect = postgresql if self._is_postgresql else sqlite
            new = dialect.insert(schema.accounts).values(id=account_id, plan="free")
            await self._connection.execute(new.on_conflict_do_nothing())
            account = await self.lock_known_account(account_id)
        assert account is not None  # noqa: S101  # it was there, or was inserted
        return account

    async def lock_known_account(self, account_id: str) -> LockedAccount | None:
        """Return the account, if there is one, and hold it."""
        lock = select(schema.accounts).where(schema.accounts.c.id == account_id).with_for_update()
        row = (await self._connection.execute(lock)).one_or_none()
        return None if row is None else LockedAccount(row.id, row.plan, row.suspended_at)

    async def lock_accounts(self, account_ids: Iterable[str]) -> list[Holding]:
        """Return the accounts, made and put on the plan "free" where they are new; hold them all.

        They are locked in one order, so that two who hold many do not wait for each other.
        """
        wanted = sorted(account_ids)
        accounts = schema.accounts.c
        lock = (
            select(accounts.id)
            .where(accounts.id.in_(wanted))
            .order_by(accounts.id)
            .with_for_update()
        )
        known = set((await self._connection.execute(lock)).scalars())
        if new := [{"id": one, "plan": "free"} for one in wanted if one not in known]:
            dialect = postgresql if self._is_postgresql else sqlite
            add = dialect.insert(schema.accounts).values(new).on_conflict_do_nothing()
            await self._connection.execute(add)
            await self._connection.execute(lock)
        return await read_holdings(self._connection, wanted, self.now)

    async def set_plan(self, account_id: str, plan: str) -> None:
        await self._connection.execute(
            update(schema.accounts).where(schema.accounts.c.id == account_id).values(plan=plan)
        )

    async def count_active_keys(self, account_id: str) -> int:
        """Count the keys of the account that are neither revoked nor expired nor replaced."""
        keys = schema.keys.c
        statement = (
            select(func.count())
            .select_from(schema.keys)
            .where(keys.account_id == account_id, *counts_for_plan(self.now))
        )
        return (await self._connection.execute(statement)).scalar_one()

    async def active_scopes(self, account_id: str, key_id: UUID) -> frozenset[str] | None:
        """Return the scopes of the account's key; none if it is not active now."""
        keys = schema.keys.c
        statement = (
            select(keys.scopes)
            .join_from(schema.keys, schema.accounts)
            .where(keys.id == key_id, keys.account_id == account_id, *is_active(self.now))
            .where(schema.accounts.c.suspended_at.is_(None))
        )
        scopes = (await self._connection.execute(statement)).scalar_one_or_none()
        return None if scopes is None else granted(scopes)

    async def insert_key(
        self,
        key: ApiKey,
        *,
        secret_hash: str,
        digest: bytes | None,
        digest_key_id: str | None,
        created_by: str,
    ) -> None:
        """Insert *key* as version 1. Raises `PrefixTaken`."""
        await self.insert_keys([NewKey(key, secret_hash, digest, digest_key_id, created_by)])

    async def insert_keys(self, new: Sequence[NewKey]) -> None:
        """Insert *new* keys, each as version 1, in their order. Raises `PrefixTaken`."""
        try:
            await self._connection.execute(insert(schema.keys), [_row_of(one) for one in new])
        except IntegrityError as error:
            # The constraint's name on PostgreSQL, the column's on SQLite.
            if "tfm_keys_prefix" in str(error.orig) or "tfm_keys.prefix" in str(error.orig):
                raise PrefixTaken from error
            raise
        self._pending += [("created", one.key.key_prefix, 1) for one in new]

    async def lock_key(self, account_id: str, key_id: UUID) -> LockedKey | None:
        """Return the account's key, revoked or not, and hold it and the account."""
        wanted = {"locked_id": key_id, "locked_account_id": account_id}
        row = (await self._connection.execute(_LOCK_KEY, wanted)).one_or_none()
        return None if row is None else LockedKey(*row)._replace(scopes=granted(row.scopes))

    async def change_key(self, kind: ChangeKind, key: LockedKey, **values: Any) -> None:
        """Set these *values* of a locked *key*, at the end of the transaction."""
        version = key.version + 1
        if "scopes" in values:
            values["scopes"] = _written(values["scopes"])
        parameters = {f"changed_{name}": value for name, value in values.items()}
        await self._put_off(
            _update_key(tuple(sorted(values))),
            parameters | {"changed_id": key.id, "changed_version": version},
        )
        self._pending.append((kind, key.prefix, version))

    async def change_active_keys(self, kind: ChangeKind, account_id: str, **values: Any) -> None:
        """Set these *values* of all active keys of a locked account."""
        await self._change_keys(kind, account_id, *is_active(self.now), **values)

    async def revoke_keys(self, account_id: str) -> None:
        """Revoke all keys of a locked account that are not revoked, expired ones too."""
        live = schema.keys.c.revoked_at.is_(None)
        await self._change_keys("revoked", account_id, live, revoked_at=self.now)

    async def _change_keys(
        self, kind: ChangeKind, account_id: str, *which: ColumnElement[bool], **values: Any
    ) -> None:
        keys = schema.keys.c
        changed = await self._connection.execute(
            update(schema.keys)
            .where(keys.account_id == account_id, *which)
            .values(version=keys.version + 1, **values)
            .returning(keys.prefix, keys.version)
        )
        # In an order that does not depend on where the rows lie.
        self._pending += sorted((kind, row.prefix, row.version) for row in changed)

    async def states(self, account_id: str, *, kind: ChangeKind) -> list[Change]:
        """Return what the feed had last to say of the account's keys, as changes of that *kind*.

        Only of keys about which some process may still believe something else: of those that are
        not revoked for certain.
        """
        keys = schema.keys.c
        head = await self.head()
        rows = await self._connection.execute(
            select(keys.prefix, keys.version)
            .where(keys.account_id == account_id, keys.confirmed_at.is_(None))
            .order_by(keys.prefix)
        )
        return [Change(head, kind, row.prefix, row.version) for row in rows]

    async def last_used_at(self, key_id: UUID) -> datetime | None:
        """Return when a key was last used, as far as that is written."""
        usage = schema.key_usage.c
        statement = select(usage.last_used_at).where(usage.key_id == key_id)
        return (await self._connection.execute(statement)).scalar_one_or_none()

    async def has_active_predecessor(self, account_id: str, key_id: UUID) -> bool:
        """Tell whether a key that this one replaces is still in its grace."""
        keys = schema.keys.c
        predecessor = select(keys.id).where(
            keys.account_id == account_id, keys.replaced_by == key_id, *is_active(self.now)
        )
        return (await self._connection.execute(predecessor)).first() is not None

    async def suspend_account(self, account_id: str, suspended_at: datetime | None) -> None:
        """Have the account's keys refused from *suspended_at* on; none ends that."""
        await self._connection.execute(
            update(schema.accounts)
            .where(schema.accounts.c.id == account_id)
            .values(suspended_at=suspended_at)
        )

    async def erase_account(self, account_id: str, *, known: Iterable[Change]) -> bool:
        """Delete a locked account and what is known of it, if all processes refuse all its keys.

        Not so while a key is not revoked, or revoked but neither confirmed nor among *known*.
        Its keys' prefixes stay taken: they go, with nothing else, to the account with no name.
        """
        keys = schema.keys.c
        mine = keys.account_id == account_id
        live = select(keys.id).where(mine, keys.revoked_at.is_(None))
        if (await self._connection.execute(live)).first() is not None:
            return False
        refused = {(change.prefix, change.version) for change in known}
        for change in await self.states(account_id, kind="revoked"):
            if (change.prefix, change.version) not in refused:
                return False
        await self.lock_account(ERASED_ACCOUNT)
        for kept in (schema.key_usage, schema.usage_hours, schema.signs):
            await self._connection.execute(
                delete(kept).where(kept.c.key_id.in_(select(keys.id).where(mine)))
            )
        nothing = dict.fromkeys(("name", "secret_hash", "scopes", "created_by"), "")
        await self._connection.execute(
            update(schema.keys)
            .where(mine)
            .values(
                account_id=ERASED_ACCOUNT,
                digest=None,
                digest_key_id=None,
                created_at=keys.revoked_at,
                expires_at=None,
                replaced_by=None,
                replaced_at=None,
                confirmed_at=self.now,
                **nothing,
            )
        )
        for table, column in ((schema.audit, "account_id"), (schema.accounts, "id")):
            await self._connection.execute(delete(table).where(table.c[column] == account_id))
        return True

    async def head(self) -> int:
        """Return the number of the latest change that was committed before."""
        return await feed.head(self._connection)

    async def audit(
        self,
        *,
        account_id: str,
        actor: str | Actor,
        action: str,
        target_type: TargetType = "API key",
        target_id: UUID | str,
        target_name: str,
        meta: Mapping[str, Any],
    ) -> None:
        """Append a row about a key or an account to the audit log, at the end of the transaction.

        There the head of the feed is locked, so the order of the rows' ids is that of the commits
        too: who reads up to an id misses none.
        """
        who = Actor.of(actor)
        row = {
            "account_id": account_id,
            "actor": who.name,
            "action": action,
            "target_type": target_type,
            "target_name": target_name,
            "target_id": str(target_id),
            "category": SECURITY,
            "meta": msgspec.json.encode(meta).decode(),
            "request_id": who.request_id,
            "created_at": self.now,
        }
        self._audited.append({f"audit_{name}": value for name, value in row.items()})

    async def append_changes(self) -> None:
        """Write what was put off, number the changes and append them to the feed, last of all.

        The head's row stays locked until COMMIT, so the order of the numbers is the order of the
        commits: whoever sees a number has been able to see every lower one.
        """
        if not self._is_postgresql or not self._pending:
            await self._write()
        if self._pending:
            head = await self._append()
            first = head - len(self._pending) + 1
            self.changes = [Change(first + n, *change) for n, change in enumerate(self._pending)]
            if not self._is_postgresql:
                rows = [change._asdict() | {"created_at": self.now} for change in self.changes]
                await self._connection.execute(insert(schema.changes), rows)
        elif self._audited and self._is_postgresql:
            await self._connection.execute(_LOCK_HEAD)
        if self._audited:
            await self._connection.execute(_AUDIT, self._audited)

    async def _append(self) -> int:
        """Add what is pending to the head's number, which is locked so; return it.

        On PostgreSQL also append it to the feed, together with what was put off.
        """
        number = {"change_count": len(self._pending)}
        if not self._is_postgresql:
            return int((await self._connection.execute(_NEXT_HEAD, number)).scalar_one())
        kinds, prefixes, versions = map(list, zip(*self._pending, strict=True))
        values: dict[str, Any] = {
            **number,
            "change_kinds": kinds,
            "change_prefixes": prefixes,
            "change_versions": versions,
            "change_created_at": self.now,
        }
        for more in self._writes.values():
            values.update(more)
        audited = self._audited[:1]
        values.update(*audited)
        append = _append_with(*self._writes, audited=bool(audited))
        self._writes = {}
        del self._audited[:1]
        return int(max((await self._connection.execute(append, values)).scalars()))

    async def _put_off(self, statement: Update, values: dict[str, Any]) -> None:
        """Have *statement* executed before COMMIT, together with appending to the feed."""
        if statement in self._writes:
            await self._write()
        self._writes[statement] = values

    async def _write(self) -> None:
        for statement, values in self._writes.items():
            await self._connection.execute(statement, values)
        self._writes = {}


def _row_of(new: NewKey) -> dict[str, Any]:
    key = new.key
    return {
        "id": key.id,
        "account_id": key.account_id,
        "name": key.name,
        "prefix": key.key_prefix,
        "secret_hash": new.secret_hash,
        "digest": new.digest,
        "digest_key_id": new.digest_key_id,
        "scopes": _written(key.scopes),
        "version": 1,
        "created_at": key.created_at,
        "created_by": new.created_by,
        "expires_at": key.expires_at,
    }


def _parameters(table: Table, names: Iterable[str], prefix: str) -> dict[str, Any]:
    # Not named as the columns: SQLAlchemy would take them for those of any table in the statement.
    return {name: bindparam(f"{prefix}_{name}", type_=table.c[name].type) for name in names}


_LOCK_KEY: Final = (
    select(*(schema.keys.c[name] for name in LockedKey._fields))
    .join_from(schema.accounts, schema.keys)
    .where(
        schema.keys.c.id == bindparam("locked_id"),
        schema.keys.c.account_id == bindparam("locked_account_id"),
    )
    # Both: of what it waited for, PostgreSQL returns the newest state, of what is joined to that,
    # the state when the statement began.
    .with_for_update(of=[schema.accounts, schema.keys])
)
_AUDITED: Final = _parameters(
    schema.audit, [c.name for c in schema.audit.c if c.name != "id"], "audit"
)
_AUDIT: Final = insert(schema.audit).values(_AUDITED)
_LOCK_HEAD: Final = select(schema.feed.c.head).with_for_update()
_COUNT: Final = bindparam("change_count", type_=BigInteger)
_NEXT_HEAD: Final = (
    update(schema.feed).values(head=schema.feed.c.head + _COUNT).returning(schema.feed.c.head)
)
_next: Final = _NEXT_HEAD.cte("next")
_pending: Final = (
    func.unnest(
        bindparam("change_kinds", type_=postgresql.ARRAY(Text)),
        bindparam("change_prefixes", type_=postgresql.ARRAY(Text)),
        bindparam("change_versions", type_=postgresql.ARRAY(BigInteger)),
    )
    .table_valued("kind", "prefix", "version", with_ordinality="position", name="pending")
    .render_derived()
)
_APPEND: Final = (
    insert(schema.changes)
    .from_select(
        ["id", "kind", "prefix", "version", "created_at"],
        select(
            _next.c.head - _COUNT + _pending.c.position,
            _pending.c.kind,
            _pending.c.prefix,
            _pending.c.version,
            bindparam("change_created_at", type_=schema.changes.c.created_at.type),
        ).select_from(_next.join(_pending, true())),
    )
    .returning(schema.changes.c.id)
)
# PostgreSQL executes the parts of a statement in no certain order. Selected from the head's new
# row, this one gets its id once that row is locked.
_AUDIT_WITH_NEXT: Final = insert(schema.audit).from_select(
    [*_AUDITED], select(*_AUDITED.values()).select_from(_next)
)


@cache
def _update_key(columns: tuple[str, ...]) -> Update:
    values = _parameters(schema.keys, (*columns, "version"), "changed")
    return update(schema.keys).where(schema.keys.c.id == bindparam("changed_id")).values(values)


@cache
def _append_with(*writes: Update, audited: bool) -> Insert:
    # All in one statement, which SQLite cannot: every round trip prolongs the time to revoke.
    parts = [*writes, _AUDIT_WITH_NEXT] if audited else writes
    return _APPEND.add_cte(*(part.cte(f"write_{n}") for n, part in enumerate(parts)))


def is_active(now: Any) -> tuple[Any, ...]:
    """Return the conditions under which a key is neither revoked nor expired at *now*."""
    keys = schema.keys.c
    return keys.revoked_at.is_(None), or_(keys.expires_at.is_(None), keys.expires_at > now)


def counts_for_plan(now: Any) -> tuple[Any, ...]:
    """Return the conditions under which a key is one of those that a plan limits, at *now*."""
    return *is_active(now), schema.keys.c.replaced_by.is_(None)


def granted(scopes: str) -> frozenset[str]:
    """Return the scopes that a row has."""
    return frozenset(scopes.split())


def _written(scopes: frozenset[str]) -> str:
    return " ".join(sorted(scopes))


def key_of(row: Row[Any], last_used_at: datetime | None) -> ApiKey:
    """Return the key that a *row* of the table of keys describes."""
    return ApiKey(
        id=row.id,
        key_prefix=row.prefix,
        account_id=row.account_id,
        name=row.name,
        scopes=granted(row.scopes),
        created_at=row.created_at,
        last_used_at=last_used_at,
        expires_at=row.expires_at,
        replaced_by=row.replaced_by,
    )


async def read_holdings(
    connection: AsyncConnection, account_ids: Iterable[str], now: Any
) -> list[Holding]:
    """Return what each account holds at *now*; one that is not there is on the plan "free"."""
    wanted = list(account_ids)
    keys, accounts = schema.keys.c, schema.accounts.c
    counted = and_(keys.account_id == accounts.id, *counts_for_plan(now))
    rows = await connection.execute(
        select(accounts.id, accounts.plan, func.count(keys.id))
        .select_from(schema.accounts.outerjoin(schema.keys, counted))
        .where(accounts.id.in_(wanted))
        .group_by(accounts.id, accounts.plan)
    )
    found = {row.id: Holding(*row) for row in rows}
    return [found.get(one, Holding(one, "free", 0)) for one in wanted]
