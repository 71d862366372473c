"""Managing keys: each change is one transaction, with its audit row and its feed row.

What takes something away from a key (revoking, narrowing, rotating) returns only when no process
acts on what the key was before.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

from tfm_guard.clock import Clock
from tfm_guard.confirmation import Confirmation
from tfm_guard.errors import (
    AlreadyReplaced,
    InsufficientScope,
    InvalidInput,
    InvalidToken,
    KeyNotFound,
    NotConfirmed,
    PlanLimitReached,
    Unavailable,
)
from tfm_guard.hashing import Hashing
from tfm_guard.records import (
    Actor,
    ApiKey,
    Change,
    CreatedKey,
    KeyStatus,
    KeyUsage,
    Revocation,
    RotatedKey,
    UsageRange,
    VerifiedKey,
)
from tfm_guard.scopes import DEFAULT_SCOPES, MANAGING_SCOPE, ScopeRegistry
from tfm_guard.signs import status_of
from tfm_guard.store import LockedKey, PrefixTaken, Store, Transaction
from tfm_guard.text import check_id, plain_text
from tfm_guard.token import RANDOM_BYTES, DigestKey, Tagger, prefix_of
from tfm_guard.usage import span_of, summarize

T = TypeVar("T")

MAXIMUM_NAME_LENGTH: Final = 100
DEFAULT_GRACE: Final = timedelta(hours=24)
MAXIMUM_GRACE: Final = timedelta(days=7)

_REPLACED: Final = "This key was rotated already, and works only until its grace ends."

# With a billion keys every fourth prefix is taken; sixteen in a row are not.
_MINTING_ATTEMPTS: Final = 16


class _Minted(NamedTuple):
    """A token that is a key's once it has been inserted."""

    token: bytes
    secret_hash: str

    def __repr__(self) -> str:
        return f"_Minted({prefix_of(self.token)!r})"


class KeyManager:
    """Creates, lists, changes, rotates and revokes the keys of accounts.

    *actor* is, everywhere, whom the audit log names.
    """

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
        actor: str | Actor = "application",
        caller: VerifiedKey | None = None,
    ) -> CreatedKey:
        """Create a key for *account_id* and return it with its token, which is shown this once.

        *name* has 1 to 100 characters after trimming; *scopes* are registered ones; *expires_at*
        has a zone and lies in the future. With *caller*, the key is made on behalf of that key,
        which must still be active at that moment, and may not have fewer scopes.

        Raises `InvalidInput`, `PlanLimitReached`, `InsufficientScope`, `InvalidToken`, or
        `Unavailable`, and then no key was created (unless the connection broke in the middle of
        COMMIT, which nobody can tell from here).
        """
        check_id(account_id, field="account_id")
        if caller is not None:
            actor = Actor.of(actor)._replace(name=actor_of(caller))
        name = _name(name)
        granted = self._scopes.grant(scopes)
        if caller is not None and (missing := granted - caller.scopes):
            raise InsufficientScope(missing)
        if expires_at is not None:
            expires_at = future(expires_at, self._clock)

        async def create(transaction: Transaction, minted: _Minted) -> ApiKey:
            account = await transaction.lock_account(account_id)
            await _check_caller(transaction, account_id, caller, granted)
            self._check_limit(account.plan, await transaction.count_active_keys(account_id))
            key = self._new_key(
                minted,
                account_id=account_id,
                name=name,
                scopes=granted,
                created_at=transaction.now,
                expires_at=expires_at,
            )
            await self._insert(transaction, minted, key, actor)
            return key

        # Looked at first: what is refused is not worth a hash, which takes others' time.
        (held,) = await self._store.read_holdings([account_id])
        self._check_limit(held.plan, held.active)
        minted, key, _ = await self._mint(create)
        return CreatedKey(token=minted.token.decode("ascii"), key=key)

    async def list(self, account_id: str) -> list[ApiKey]:
        """Return the active keys of *account_id*, newest first."""
        return await self._store.list_keys(account_id)

    async def unconfirmed(self, account_id: str) -> Sequence[ApiKey]:
        """Return the revoked keys of *account_id* that some process may still accept.

        They were not confirmed yet, or nobody stayed to hear it. Revoking again joins the wait.
        """
        return await self._store.list_unconfirmed(account_id)

    async def get(self, account_id: str, key_id: UUID) -> ApiKey:
        """Return the active key *key_id* of *account_id*. Raises `KeyNotFound`."""
        key = await self._store.get_key(account_id, key_id)
        if key is None:
            raise KeyNotFound
        return key

    async def change(
        self,
        account_id: str,
        key_id: UUID,
        *,
        name: str | None = None,
        scopes: Iterable[str] | None = None,
        actor: str | Actor = "application",
        caller: VerifiedKey | None = None,
    ) -> ApiKey:
        """Give an active key another *name*, or only some of its *scopes*; return what it is then.

        With *scopes*, even the same, it returns when no process lets the key do more, as `revoke`
        does. With *caller*, that key must still be active, and may manage keys. Raises
        `InvalidInput`, also for a scope that the key lacks; `KeyNotFound`; `NotConfirmed`;
        `InsufficientScope`; `InvalidToken`; `Unavailable`.
        """
        if caller is not None:
            actor = Actor.of(actor)._replace(name=actor_of(caller))
        if name is None and scopes is None:
            raise InvalidInput((), "missing", "Give a name, or scopes, or both")
        name = None if name is None else _name(name)
        kept = None if scopes is None else _listed(scopes)

        async def change(transaction: Transaction) -> tuple[ApiKey, Change]:
            row = await _lock_active(transaction, account_id, key_id)
            await _check_caller(transaction, account_id, caller)
            if kept is not None:
                _check_narrowing(kept, row.scopes)
            new = row._replace(
                name=row.name if name is None else name,
                scopes=row.scopes if kept is None else frozenset(kept),
            )
            await _write_change(transaction, row, new, actor)
            last_used_at = await transaction.last_used_at(key_id)
            unchanged = Change(await transaction.head(), "narrowed", row.prefix, row.version)
            return _api_key(new, last_used_at), unchanged

        (key, unchanged), changes = await self._store.transact(change)
        if kept is not None:
            await self._confirmation.wait(changes or [unchanged])
        return key

    async def rotate(
        self,
        account_id: str,
        key_id: UUID,
        *,
        grace: timedelta = DEFAULT_GRACE,
        actor: str | Actor = "application",
        caller: VerifiedKey | None = None,
    ) -> RotatedKey:
        """Create a key that takes the place of an active one, which works on for *grace*.

        The new key has the name and scopes of the old one, and works as long from now on as the old
        one did from its creation, if that has an end. *grace* is 0 to 7 days; a key that ends
        earlier does so. The plan's limit does not matter: of the two only the new one counts. With
        *caller*, that key must still be active, with every scope of the rotated key.

        Raises `AlreadyReplaced` for a key in its grace, or whose predecessor is; `KeyNotFound`;
        `InvalidInput`; `InsufficientScope`; `InvalidToken`; `Unavailable`.
        """
        if not timedelta() <= grace <= MAXIMUM_GRACE:
            raise InvalidInput(
                ("grace",), "grace_range", "The grace is 0 to 7 days (604800 seconds)"
            )
        if caller is not None:
            actor = Actor.of(actor)._replace(name=actor_of(caller))

        async def rotate(transaction: Transaction, minted: _Minted) -> tuple[ApiKey, datetime]:
            row = await _lock_active(transaction, account_id, key_id)
            await _check_caller(transaction, account_id, caller, row.scopes)
            await _check_not_replaced(transaction, row)
            end = transaction.now + grace
            if row.expires_at is not None:
                end = min(end, row.expires_at)
            key = self._new_key(
                minted,
                account_id=account_id,
                name=row.name,
                scopes=row.scopes,
                created_at=transaction.now,
                expires_at=_same_lifetime(row, transaction.now),
            )
            await self._insert(transaction, minted, key, actor, replaces=row)
            await transaction.change_key(
                "replaced", row, replaced_by=key.id, replaced_at=transaction.now, expires_at=end
            )
            meta = {"replaced_by": str(key.id), "grace_seconds": int(grace.total_seconds())}
            await _audit(transaction, row, actor, "rotated", meta)
            return key, end

        # Looked at first, as when a key is created.
        if (await self.get(account_id, key_id)).replaced_by is not None:
            raise AlreadyReplaced(_REPLACED)
        minted, (key, end), changes = await self._mint(rotate)
        confirmed = None
        with contextlib.suppress(NotConfirmed):
            confirmed = await self._confirmation.wait(changes)
        return RotatedKey(
            token=minted.token.decode("ascii"),
            key=key,
            replaces=key_id,
            grace_ends_at=end,
            confirmed=confirmed,
        )

    def status(self, key: ApiKey) -> KeyStatus:
        """Return what there is to say about *key* now (`tfm_guard.signs.status_of`)."""
        return status_of(key, self._clock.now())

    async def usage(
        self,
        account_id: str,
        key_id: UUID,
        *,
        range: UsageRange = "24h",  # noqa: A002  # named as in the management API
    ) -> KeyUsage:
        """Return how often *key_id* of *account_id* was accepted and refused, revoked or not.

        By hour for *range* "24h" and "7d", by day (UTC) for "30d" and "90d". What happened in the
        last flush interval (5 s) may be missing. Raises `KeyNotFound`, `InvalidInput` and
        `Unavailable`.
        """
        found = await self._store.read_usage(account_id, key_id, span_of(range))
        if found is None:
            raise KeyNotFound
        return summarize(range, *found)

    async def usage_of(
        self,
        keys: Iterable[ApiKey],
        *,
        range: UsageRange = "24h",  # noqa: A002  # as above
    ) -> dict[UUID, KeyUsage]:
        """Return, as `usage` does, how often each of *keys* was accepted and refused, by its id."""
        now, hours = await self._store.read_usage_of([key.id for key in keys], span_of(range))
        return {key_id: summarize(range, now, those) for key_id, those in hours.items()}

    async def id_of(self, account_id: str, key_prefix: str) -> UUID:
        """Return the id of the account's key with that prefix, active or not.

        Raises `KeyNotFound`.
        """
        row = (await self._store.find_keys([key_prefix])).get(key_prefix)
        if row is None or row.account_id != account_id:
            raise KeyNotFound
        return row.id

    async def revoke(
        self, account_id: str, key_id: UUID, *, actor: str | Actor = "application"
    ) -> Revocation:
        """Revoke the key *key_id* of *account_id* for good; return when it is refused everywhere.

        This takes milliseconds while all processes are well, about 1.5 times the lease when one is
        dead or stopped, and until then `NotConfirmed` is raised after some seconds: the key is
        revoked, the work goes on, and revoking it again joins the wait. So it does when it was
        cancelled meanwhile. Raises `KeyNotFound` where the account has no such key or its
        revocation was confirmed before, and `Unavailable`.
        """
        change = await self._store.revoke_key(account_id, key_id, actor)
        if change is None:
            raise KeyNotFound
        return await self._confirmation.wait(
            [change],
            confirmed=lambda: self._store.confirm_revocation(key_id),
        )

    async def _mint(
        self, work: Callable[[Transaction, _Minted], Awaitable[T]]
    ) -> tuple[_Minted, T, Sequence[Change]]:
        """Run *work* in a transaction with a token; again, with another, if its prefix is taken."""
        for _ in range(_MINTING_ATTEMPTS):
            token = self._tagger.mint(self._random(RANDOM_BYTES))
            minted = _Minted(token, await self._hashing.hash(token))

            async def run(transaction: Transaction, minted: _Minted = minted) -> T:
                return await work(transaction, minted)

            with contextlib.suppress(PrefixTaken):
                result, changes = await self._store.transact(run)
                return minted, result, changes
        raise Unavailable(f"{_MINTING_ATTEMPTS} minted prefixes in a row were taken")

    def _new_key(self, minted: _Minted, **values: Any) -> ApiKey:
        return ApiKey(
            id=UUID(bytes=self._random(16), version=4),
            key_prefix=prefix_of(minted.token),
            last_used_at=None,
            replaced_by=None,
            **values,
        )

    async def _insert(
        self,
        transaction: Transaction,
        minted: _Minted,
        key: ApiKey,
        actor: str | Actor,
        replaces: LockedKey | None = None,
    ) -> None:
        await transaction.insert_key(
            key,
            secret_hash=minted.secret_hash,
            digest=self._digest_key.digest(minted.token),
            digest_key_id=self._digest_key.id,
            created_by=Actor.of(actor).name,
        )
        meta: dict[str, Any] = {"key_prefix": key.key_prefix, "permissions": sorted(key.scopes)}
        if replaces is not None:
            meta["replaces"] = str(replaces.id)
        await transaction.audit(
            account_id=key.account_id,
            actor=actor,
            action="api_key.created",
            target_id=key.id,
            target_name=key.name,
            meta=meta,
        )

    def _check_limit(self, plan: str, current: int) -> None:
        # A plan that was taken out of the settings grants what an unknown account has.
        limit = self._plans.get(plan, self._plans["free"])
        if current >= limit:
            raise PlanLimitReached(plan=plan, limit=limit, current=current)


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


async def _lock_active(transaction: Transaction, account_id: str, key_id: UUID) -> LockedKey:
    row = await transaction.lock_key(account_id, key_id)
    if row is None or row.revoked_at is not None:
        raise KeyNotFound
    # A rotation that ended the key may be what was waited for, longer than the transaction is old.
    now = max(transaction.now, row.replaced_at or transaction.now)
    if row.expires_at is not None and row.expires_at <= now:
        raise KeyNotFound
    return row


async def _audit(
    transaction: Transaction,
    row: LockedKey,
    actor: str | Actor,
    action: str,
    meta: Mapping[str, Any] | None = None,
) -> None:
    await transaction.audit(
        account_id=row.account_id,
        actor=actor,
        action=f"api_key.{action}",
        target_id=row.id,
        target_name=row.name,
        meta={"key_prefix": row.prefix, **(meta or {})},
    )


async def _write_change(
    transaction: Transaction, old: LockedKey, new: LockedKey, actor: str | Actor
) -> None:
    if new.name != old.name:
        await _audit(transaction, old, actor, "renamed", {"name": new.name})
    if new.scopes != old.scopes:
        meta = {
            "permissions": sorted(new.scopes),
            "removed": sorted(old.scopes - new.scopes),
        }
        await _audit(transaction, old, actor, "narrowed", meta)
        await transaction.change_key("narrowed", old, name=new.name, scopes=new.scopes)
    elif new.name != old.name:
        await transaction.change_key("renamed", old, name=new.name)


async def _check_not_replaced(transaction: Transaction, row: LockedKey) -> None:
    if row.replaced_by is not None:
        raise AlreadyReplaced(_REPLACED)
    if await transaction.has_active_predecessor(row.account_id, row.id):
        raise AlreadyReplaced(
            "The key that this one replaced is still in its grace. Delete that one first, or wait."
        )


async def _check_caller(
    transaction: Transaction,
    account_id: str,
    caller: VerifiedKey | None,
    granted: frozenset[str] = frozenset(),
) -> None:
    """Refuse a *caller* that is active no more, may not manage keys, or lacks what is *granted*.

    Asked under the account's lock, which puts it in order with revoking and narrowing the caller:
    that must also end what the caller had begun, or it could leave itself a successor.
    """
    if caller is None:
        return
    held = await transaction.active_scopes(account_id, caller.key_id)
    if held is None:
        raise InvalidToken("revoked or expired before the change was made")
    if missing := (granted | {MANAGING_SCOPE}) - held:
        raise InsufficientScope(missing)


def _check_narrowing(kept: Sequence[str], held: frozenset[str]) -> None:
    for position, scope in enumerate(kept):
        if scope not in held:
            raise InvalidInput(
                ("scopes", position),
                "scope_added",
                "A key can lose scopes, not get more. It has: "
                f"{', '.join(sorted(held)) or 'none'}. Create another key instead",
            )


def _api_key(key: LockedKey, last_used_at: datetime | None) -> ApiKey:
    return ApiKey(
        id=key.id,
        key_prefix=key.prefix,
        account_id=key.account_id,
        name=key.name,
        scopes=key.scopes,
        created_at=key.created_at,
        last_used_at=last_used_at,
        expires_at=key.expires_at,
        replaced_by=key.replaced_by,
    )


def _same_lifetime(key: LockedKey, now: datetime) -> datetime | None:
    if key.expires_at is None:
        return None
    try:
        return now + (key.expires_at - key.created_at)
    except OverflowError:  # beyond all calendars
        return key.expires_at


def _name(text: str) -> str:
    return plain_text(text, field="name", most=MAXIMUM_NAME_LENGTH)


def _listed(scopes: Iterable[str]) -> Sequence[str]:
    if isinstance(scopes, str):
        raise InvalidInput(("scopes",), "list_type", "Scopes are a list of strings.")
    return [*scopes]
