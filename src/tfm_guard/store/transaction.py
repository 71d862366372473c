"""The statements that a change is made of."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.errors import GuardError
from tfm_guard.records import ApiKey, ChangeKind
from tfm_guard.store import schema


class PrefixTaken(GuardError):
    """A key with this prefix exists already; mint another."""


class Account(NamedTuple):
    """An account as the database knows it."""

    id: str
    plan: str
    suspended_at: datetime | None


class Transaction:
    """An open transaction at *now*, the database's time. Committed by who opened it."""

    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        self._connection = connection
        self._pending: list[tuple[ChangeKind, str, int]] = []
        self.now = now

    async def lock_account(self, account_id: str, *, plan: str = "free") -> Account:
        """Return the account, made with *plan* if it is new, and hold it until the end.

        All that changes an account's keys takes this lock first, and so happens one by one.
        """
        dialect = sqlite if self._connection.dialect.name == "sqlite" else postgresql
        await self._connection.execute(
            dialect.insert(schema.accounts)
            .values(id=account_id, plan=plan)
            .on_conflict_do_nothing()
        )
        row = (
            await self._connection.execute(
                select(schema.accounts).where(schema.accounts.c.id == account_id).with_for_update()
            )
        ).one()
        return Account(row.id, row.plan, row.suspended_at)

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
            raise PrefixTaken from error
        self._pending.append(("created", key.key_prefix, 1))

    async def revoke_key(self, account_id: str, key_id: UUID) -> str | None:
        """Revoke the account's key and return its name; none if it has no such unrevoked key."""
        keys = schema.keys.c
        row = (
            await self._connection.execute(
                update(schema.keys)
                .where(keys.id == key_id, keys.account_id == account_id, keys.revoked_at.is_(None))
                .values(revoked_at=self.now, version=keys.version + 1)
                .returning(keys.name, keys.prefix, keys.version)
            )
        ).one_or_none()
        if row is None:
            return None
        self._pending.append(("revoked", row.prefix, row.version))
        return str(row.name)

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
        """Append a row about a key to the audit log."""
        await self._connection.execute(
            insert(schema.audit).values(
                account_id=account_id,
                actor=actor,
                action=action,
                target_type="API key",
                target_name=key_name,
                target_id=str(key_id),
                category="Security",
                meta=msgspec.json.encode(meta).decode(),
                created_at=self.now,
            )
        )

    async def append_changes(self) -> None:
        """Number the changes made and append them to the feed: the last statements of all.

        The head's row stays locked until COMMIT, so the order of the numbers is the order of the
        commits: whoever sees a number has been able to see every lower one.
        """
        for kind, prefix, version in self._pending:
            head = (
                await self._connection.execute(
                    update(schema.feed)
                    .values(head=schema.feed.c.head + 1)
                    .returning(schema.feed.c.head)
                )
            ).scalar_one()
            await self._connection.execute(
                insert(schema.changes).values(
                    id=head, kind=kind, prefix=prefix, version=version, created_at=self.now
                )
            )


def is_active(now: Any) -> tuple[Any, ...]:
    """Return the conditions under which a key is neither revoked nor expired at *now*."""
    keys = schema.keys.c
    return keys.revoked_at.is_(None), or_(keys.expires_at.is_(None), keys.expires_at > now)
