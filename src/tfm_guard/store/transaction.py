"""The statements that a change is made of."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import (
    Insert,
    Row,
    Table,
    Update,
    and_,
    bindparam,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.errors import GuardError
from tfm_guard.records import ApiKey, Change, ChangeKind
from tfm_guard.store import feed, schema

_CHANGE_COLUMNS: Final = ("kind", "prefix", "version", "created_at")


class PrefixTaken(GuardError):
    """A key with this prefix exists already; mint another."""


class Account(NamedTuple):
    """An account as the database knows it."""

    id: str
    plan: str


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
        self._writes: dict[Insert | Update, dict[str, Any]] = {}
        self._is_postgresql = connection.dialect.name == "postgresql"
        self.changes: list[Change] = []
        self.now = now

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
        digest: bytes | None,
        digest_key_id: str | None,
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
        actor: str,
        action: str,
        key_id: UUID,
        key_name: str,
        meta: Mapping[str, Any],
    ) -> None:
        """Append a row about a key to the audit log, at the end of the transaction."""
        row = {
            "account_id": account_id,
            "actor": actor,
            "action": action,
            "target_type": "API key",
            "target_name": key_name,
            "target_id": str(key_id),
            "category": "Security",
            "meta": msgspec.json.encode(meta).decode(),
            "created_at": self.now,
        }
        await self._put_off(_AUDIT, {f"audit_{name}": value for name, value in row.items()})

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

    async def _append_with_writes(self, row: Mapping[str, Any]) -> int:
        values = {f"change_{name}": value for name, value in row.items()}
        for more in self._writes.values():
            values.update(more)
        append = _append_with(*self._writes)
        self._writes = {}
        head: int = (await self._connection.execute(append, values)).scalar_one()
        return head

    async def _put_off(self, statement: Insert | Update, values: dict[str, Any]) -> None:
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
_AUDITED: Final = [c.name for c in schema.audit.c if c.name not in {"id", "request_id"}]
_AUDIT: Final = insert(schema.audit).values(_parameters(schema.audit, _AUDITED, "audit"))
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


@cache
def _append_with(*writes: Insert | Update) -> Insert:
    # All in one statement, which SQLite cannot: every round trip prolongs the time to revoke.
    return _APPEND.add_cte(*(write.cte(f"write_{n}") for n, write in enumerate(writes)))


def is_active(now: Any) -> tuple[Any, ...]:
    """Return the conditions under which a key is neither revoked nor expired at *now*."""
    keys = schema.keys.c
    return keys.revoked_at.is_(None), or_(keys.expires_at.is_(None), keys.expires_at > now)


async def read_holdings(
    connection: AsyncConnection, account_ids: Iterable[str], now: Any
) -> list[Holding]:
    """Return what each account holds at *now*; one that is not there is on the plan "free"."""
    wanted = list(account_ids)
    keys, accounts = schema.keys.c, schema.accounts.c
    counted = and_(keys.account_id == accounts.id, keys.replaced_by.is_(None), *is_active(now))
    rows = await connection.execute(
        select(accounts.id, accounts.plan, func.count(keys.id))
        .select_from(schema.accounts.outerjoin(schema.keys, counted))
        .where(accounts.id.in_(wanted))
        .group_by(accounts.id, accounts.plan)
    )
    found = {row.id: Holding(*row) for row in rows}
    return [found.get(one, Holding(one, "free", 0)) for one in wanted]
