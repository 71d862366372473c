"""The statements that a change is made of."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Insert, Row, Table, Update, bindparam, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.errors import GuardError
from tfm_guard.records import SECURITY, Actor, ApiKey, Change, ChangeKind, TargetType
from tfm_guard.store import feed, schema

_CHANGE_COLUMNS: Final = ("kind", "prefix", "version", "created_at")


class PrefixTaken(GuardError):
    """A key with this prefix exists already; mint another."""


class Account(NamedTuple):
    """An account as the database knows it."""

    id: str
    plan: str


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

    async def lock_account(self, account_id: str) -> Account:
        """Return the account, made and put on the plan "free" if it is new, and hold it.

        All that changes an account's keys takes this lock first, and so happens one by one.
        """
        lock = select(schema.accounts).where(schema.accounts.c.id == account_id).with_for_update()
        row = (await self._connection.execute(lock)).one_or_none()
        if row is None:
            dialect = postgresql if self._is_postgresql else sqlite
            new = dialect.insert(schema.accounts).values(id=account_id, plan="free")
            await self._connection.execute(new.on_conflict_do_nothing())
            row = (await self._connection.execute(lock)).one()
        return Account(row.id, row.plan)

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
            .where(keys.account_id == account_id, keys.replaced_by.is_(None))
            .where(*is_active(self.now))
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
        return None if scopes is None else frozenset(scopes.split())

    async def insert_key(
        self,
        key: ApiKey,
        *,
        secret_hash: str,
        digest: bytes,
        digest_key_id: str,
        created_by: str,
    ) -> None:
        """Insert *key* as version 1. Raises `PrefixTaken`."""
        try:
            await self._connection.execute(
                insert(schema.keys).values(
                    id=key.id,
                    account_id=key.account_id,
                    name=key.name,
                    prefix=key.key_prefix,
                    secret_hash=secret_hash,
                    digest=digest,
                    digest_key_id=digest_key_id,
                    scopes=" ".join(sorted(key.scopes)),
                    version=1,
                    created_at=key.created_at,
                    created_by=created_by,
                    expires_at=key.expires_at,
                )
            )
        except IntegrityError as error:
            # The constraint's name on PostgreSQL, the column's on SQLite.
            if "tfm_keys_prefix" in str(error.orig) or "tfm_keys.prefix" in str(error.orig):
                raise PrefixTaken from error
            raise
        self._pending.append(("created", key.key_prefix, 1))

    async def lock_key(self, account_id: str, key_id: UUID) -> Row[Any] | None:
        """Return the row of the account's key, revoked or not, and hold it and the account."""
        wanted = {"locked_id": key_id, "locked_account_id": account_id}
        return (await self._connection.execute(_LOCK_KEY, wanted)).one_or_none()

    async def revoke_key(self, key_id: UUID, prefix: str, version: int) -> None:
        """Revoke a key, which so comes to *version*, at the end of the transaction."""
        values = {"revoked_id": key_id, "revoked_now": self.now, "revoked_version": version}
        await self._put_off(_REVOKE, values)
        self._pending.append(("revoked", prefix, version))

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
        for kind, prefix, version in self._pending:
            row = {"kind": kind, "prefix": prefix, "version": version, "created_at": self.now}
            if self._is_postgresql:
                head = await self._append_with_writes(row)
            else:
                head = (await self._connection.execute(_NEXT_HEAD)).scalar_one()
                await self._connection.execute(insert(schema.changes).values(id=head, **row))
            self.changes.append(Change(head, kind, prefix, version))
        if self._audited:
            if self._is_postgresql and not self._pending:
                await self._connection.execute(_LOCK_HEAD)
            await self._connection.execute(_AUDIT, self._audited)

    async def _append_with_writes(self, row: Mapping[str, Any]) -> int:
        values = {f"change_{name}": value for name, value in row.items()}
        for more in self._writes.values():
            values.update(more)
        audited = self._audited[:1]
        values.update(*audited)
        append = _append_with(*self._writes, audited=bool(audited))
        self._writes = {}
        del self._audited[:1]
        head: int = (await self._connection.execute(append, values)).scalar_one()
        return head

    async def _put_off(self, statement: Update, values: dict[str, Any]) -> None:
        """Have *statement* executed before COMMIT, together with appending to the feed."""
        if statement in self._writes:
            await self._write()
        self._writes[statement] = values

    async def _write(self) -> None:
        for statement, values in self._writes.items():
            await self._connection.execute(statement, values)
        self._writes = {}


def _parameters(table: Table, names: Iterable[str], prefix: str) -> dict[str, Any]:
    # Not named as the columns: SQLAlchemy would take them for those of any table in the statement.
    return {name: bindparam(f"{prefix}_{name}", type_=table.c[name].type) for name in names}


_LOCK_KEY: Final = (
    select(schema.keys)
    .join_from(schema.accounts, schema.keys)
    .where(
        schema.keys.c.id == bindparam("locked_id"),
        schema.keys.c.account_id == bindparam("locked_account_id"),
    )
    # Both: of what it waited for, PostgreSQL returns the newest state, of what is joined to that,
    # the state when the statement began.
    .with_for_update(of=[schema.accounts, schema.keys])
)
_REVOKE: Final = (
    update(schema.keys)
    .where(schema.keys.c.id == bindparam("revoked_id"))
    .values(revoked_at=bindparam("revoked_now"), version=bindparam("revoked_version"))
)
_AUDITED: Final = _parameters(
    schema.audit, [c.name for c in schema.audit.c if c.name != "id"], "audit"
)
_AUDIT: Final = insert(schema.audit).values(_AUDITED)
_LOCK_HEAD: Final = select(schema.feed.c.head).with_for_update()
_NEXT_HEAD: Final = (
    update(schema.feed).values(head=schema.feed.c.head + 1).returning(schema.feed.c.head)
)
_next: Final = _NEXT_HEAD.cte("next")
_APPEND: Final = (
    insert(schema.changes)
    .from_select(
        ["id", *_CHANGE_COLUMNS],
        select(_next.c.head, *_parameters(schema.changes, _CHANGE_COLUMNS, "change").values()),
    )
    .returning(schema.changes.c.id)
)
# PostgreSQL executes the parts of a statement in no certain order. Selected from the head's new
# row, this one gets its id once that row is locked.
_AUDIT_WITH_NEXT: Final = insert(schema.audit).from_select(
    [*_AUDITED], select(*_AUDITED.values()).select_from(_next)
)


@cache
def _append_with(*writes: Update, audited: bool) -> Insert:
    # All in one statement, which SQLite cannot: every round trip prolongs the time to revoke.
    parts = [*writes, _AUDIT_WITH_NEXT] if audited else writes
    return _APPEND.add_cte(*(part.cte(f"write_{n}") for n, part in enumerate(parts)))


def is_active(now: Any) -> tuple[Any, ...]:
    """Return the conditions under which a key is neither revoked nor expired at *now*."""
    keys = schema.keys.c
    return keys.revoked_at.is_(None), or_(keys.expires_at.is_(None), keys.expires_at > now)


def key_of(row: Row[Any], last_used_at: datetime | None) -> ApiKey:
    """Return the key that a *row* of the table of keys describes."""
    return ApiKey(
        id=row.id,
        key_prefix=row.prefix,
        account_id=row.account_id,
        name=row.name,
        scopes=frozenset(row.scopes.split()),
        created_at=row.created_at,
        last_used_at=last_used_at,
        expires_at=row.expires_at,
        replaced_by=row.replaced_by,
    )
