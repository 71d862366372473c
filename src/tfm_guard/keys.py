"""Managing keys: each change is one transaction, with its audit row and its feed row."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from tfm_guard.accounts import check_account_id
from tfm_guard.clock import Clock
from tfm_guard.confirmation import Confirmation
from tfm_guard.errors import (
    InsufficientScope,
    InvalidInput,
    InvalidToken,
    KeyNotFound,
    PlanLimitReached,
    Unavailable,
)
from tfm_guard.hashing import Hashing
from tfm_guard.records import ApiKey, Change, CreatedKey, Revocation, VerifiedKey
from tfm_guard.scopes import DEFAULT_SCOPES, ScopeRegistry
from tfm_guard.store import Account, PrefixTaken, Store, Transaction
from tfm_guard.text import plain_text
from tfm_guard.token import RANDOM_BYTES, DigestKey, Tagger, prefix_of

MAXIMUM_NAME_LENGTH: Final = 100

# With a billion keys every fourth prefix is taken; sixteen in a row are not.
_MINTING_ATTEMPTS: Final = 16


class KeyManager:
    """Creates, lists and revokes the keys of accounts."""

    def __init__(
        self,
        *,
        store: Store,
        confirmation: Confirmation,
        hashing: Hashing,
        tagger: Tagger,
        digest_key: DigestKey,
        scopes: ScopeRegistry,
        plans: Mapping[str, int],
        clock: Clock,
        random: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._confirmation = confirmation
        self._hashing = hashing
        self._tagger = tagger
        self._digest_key = digest_key
        self._scopes = scopes
        self._plans = plans
        self._clock = clock
        self._random = random

    async def create(
        self,
        *,
        account_id: str,
        name: str,
        scopes: Iterable[str] = DEFAULT_SCOPES,
        expires_at: datetime | None = None,
        actor: str = "application",
        caller: VerifiedKey | None = None,
    ) -> CreatedKey:
        """Create a key for *account_id* and return it with its token, which is shown this once.

        *name* has 1 to 100 characters after trimming; *scopes* are registered ones; *expires_at*
        has a zone and lies in the future; *actor* is whom the audit log names. With *caller*, the
        key is made on behalf of that key, which must still be active at that moment, and may not
        have fewer scopes.

        Raises `InvalidInput`, `PlanLimitReached`, `InsufficientScope`, `InvalidToken`, or
        `Unavailable`, and then no key was created (unless the connection broke in the middle of
        COMMIT, which nobody can tell from here).
        """
        check_account_id(account_id)
        if caller is not None:
            actor = actor_of(caller)
        name = plain_text(name, field="name", most=MAXIMUM_NAME_LENGTH)
        granted = self._scopes.grant(scopes)
        if caller is not None:
            _check_grant(granted, caller.scopes)
        if expires_at is not None:
            expires_at = future(expires_at, self._clock)
        for _ in range(_MINTING_ATTEMPTS):
            token = self._tagger.mint(self._random(RANDOM_BYTES))
            secret_hash = await self._hashing.hash(token)

            async def insert(
                transaction: Transaction, token: bytes = token, secret_hash: str = secret_hash
            ) -> ApiKey:
                account = await transaction.lock_account(account_id)
                if caller is not None:
                    held = await transaction.active_scopes(account_id, caller.key_id)
                    _check_grant(granted, held)
                await self._check_limit(transaction, account)
                key = ApiKey(
                    id=UUID(bytes=self._random(16), version=4),
                    key_prefix=prefix_of(token),
                    account_id=account_id,
                    name=name,
                    scopes=granted,
                    created_at=transaction.now,
                    last_used_at=None,
                    expires_at=expires_at,
                    replaced_by=None,
                )
                await transaction.insert_key(
                    key,
                    secret_hash=secret_hash,
                    digest=self._digest_key.digest(token),
                    digest_key_id=self._digest_key.id,
                    created_by=actor,
                )
                await transaction.audit(
                    account_id=account_id,
                    actor=actor,
                    action="api_key.created",
                    key_id=key.id,
                    key_name=name,
                    meta={"key_prefix": key.key_prefix, "permissions": sorted(granted)},
                )
                return key

            with contextlib.suppress(PrefixTaken):
                key, _ = await self._store.transact(insert)
                return CreatedKey(token=token.decode("ascii"), key=key)
        raise Unavailable(f"{_MINTING_ATTEMPTS} minted prefixes in a row were taken")

    async def list(self, account_id: str) -> list[ApiKey]:
        """Return the active keys of *account_id*, newest first."""
        return await self._store.list_keys(account_id)

    async def id_of(self, account_id: str, key_prefix: str) -> UUID:
        """Return the id of the account's key with that prefix, active or not.

        Raises `KeyNotFound`.
        """
        row = (await self._store.find_keys([key_prefix])).get(key_prefix)
        if row is None or row.account_id != account_id:
            raise KeyNotFound
        return row.id

    async def revoke(
        self, account_id: str, key_id: UUID, *, actor: str = "application"
    ) -> Revocation:
        """Revoke the key *key_id* of *account_id* for good; return when it is refused everywhere.

        This takes milliseconds while all processes are well, about 1.5 times the lease when one is
        dead or stopped, and until then `NotConfirmed` is raised after some seconds: the key is
        revoked, the work goes on, and revoking it again joins the wait. So it does when it was
        cancelled meanwhile. Raises `KeyNotFound` where the account has no such key or its
        revocation was confirmed before, and `Unavailable`.
        """

        async def revoke(transaction: Transaction) -> Change | None:
            row = await transaction.lock_key(account_id, key_id)
            if row is None or row.confirmed_at is not None:
                raise KeyNotFound
            if row.revoked_at is not None:
                # Revoked earlier, here or elsewhere, and not yet confirmed. Whoever has seen the
                # feed up to its head has seen that.
                return Change(await transaction.head(), "revoked", row.prefix, row.version)
            await transaction.revoke_key(key_id, row.prefix, row.version + 1)
            await transaction.audit(
                account_id=account_id,
                actor=actor,
                action="api_key.revoked",
                key_id=key_id,
                key_name=row.name,
                meta={"key_prefix": row.prefix},
            )
            return None

        earlier, changes = await self._store.transact(revoke)
        return await self._confirmation.wait(
            [earlier] if earlier else changes,
            confirmed=lambda: self._store.confirm_revocation(key_id),
        )

    async def _check_limit(self, transaction: Transaction, account: Account) -> None:
        current = await transaction.count_active_keys(account.id)
        # A plan that was taken out of the settings grants what an unknown account has.
        limit = self._plans.get(account.plan, self._plans["free"])
        if current >= limit:
            raise PlanLimitReached(plan=account.plan, limit=limit, current=current)


def future(expires_at: datetime, clock: Clock) -> datetime:
    """Return *expires_at* in UTC; raise `InvalidInput` unless it is in the future, with a zone."""
    expires_at = in_utc(expires_at, field="expires_at")
    if expires_at <= clock.now():
        raise InvalidInput(("expires_at",), "datetime_future", "The time must be in the future")
    return expires_at


def in_utc(moment: datetime, *, field: str) -> datetime:
    """Return *moment* in UTC; raise `InvalidInput` naming *field* unless it has a zone."""
    if moment.utcoffset() is None:
        raise InvalidInput(
            (field,), "timezone_aware", "The time needs its zone, like 2030-01-01T00:00Z"
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # before year 1 or after year 9999, seen from UTC
        raise InvalidInput((field,), "datetime_range", "The time is beyond all calendars") from None


def actor_of(caller: VerifiedKey) -> str:
    """Return how the audit log names a key that acts."""
    return f"api_key:{caller.key_id}"


def _check_grant(granted: frozenset[str], held: frozenset[str] | None) -> None:
    """Refuse to grant what the caller does not hold, or holds no more.

    Asked again under the account's lock, which puts it in order with revoking the caller: that
    must also end what the caller had begun, or it could leave itself a successor.
    """
    if held is None:
        raise InvalidToken("revoked or expired before the change was made")
    if missing := granted - held:
        raise InsufficientScope(missing)
