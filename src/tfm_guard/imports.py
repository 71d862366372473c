"""Importing keys that were issued elsewhere, by their hash or by their token."""

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from hmac import compare_digest
from typing import Any, Final, Literal, NamedTuple, Self
from uuid import UUID

from msgspec import Struct

from tfm_guard.clock import Clock
from tfm_guard.errors import InvalidInput, PlanLimitReached, Refusal, Unavailable
from tfm_guard.hashing import PERMITS, Hashing, read_hash
from tfm_guard.keys import MAXIMUM_NAME_LENGTH, future, in_utc
from tfm_guard.records import Actor, ApiKey, StoredKey
from tfm_guard.scopes import NO_SCOPE, ScopeRegistry, is_scope
from tfm_guard.store import Holding, NewKey, PrefixTaken, Store, Transaction
from tfm_guard.text import check_id, plain_text
from tfm_guard.token import (
    MARK,
    PREFIX_LENGTH,
    DigestKeys,
    Tagger,
    is_prefix,
    is_tagged,
    is_untagged,
    prefix_of,
)

# Keys that are imported in one transaction.
BATCH: Final = 100

# Each time another process has imported, or minted, one of the prefixes in the same moment.
_ATTEMPTS: Final = 16


class KeyToImport(Struct, frozen=True, kw_only=True):
    """A key as it is known elsewhere: by its *secret_hash*, or by its *token*.

    The hash is of the whole token: an argon2 PHC string, or the hexadecimal digits of a SHA-256 or
    SHA-512. With a *token* the *prefix* may be left out.
    """

    account_id: str
    name: str
    scopes: Sequence[str]
    prefix: str | None = None
    secret_hash: str | None = None
    token: str | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None

    def __repr__(self) -> str:
        return f"KeyToImport({'by its hash' if self.token is None else 'by its token'})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class ImportOutcome(Struct, frozen=True):
    """What became of a key: *refusal* says why it was refused, if it was.

    It is "present" where the same key is there already: the prefix, account and hash are the same.
    """

    how: Literal["imported", "present", "refused"]
    refusal: Refusal | None = None


_PRESENT: Final = ImportOutcome("present")
_IMPORTED: Final = ImportOutcome("imported")


class _Row(NamedTuple):
    """A key that is fit to be imported; *secret_hash* is empty until a token was hashed."""

    position: int
    prefix: str
    account_id: str
    name: str
    scopes: frozenset[str]
    created_at: datetime | None
    expires_at: datetime | None
    secret_hash: str
    token: bytes | None

    @property
    def proof(self) -> bytes:
        """What two rows for one and the same key have in common."""
        return self.token or self.secret_hash.encode()

    def __repr__(self) -> str:
        return f"_Row(position={self.position}, prefix={self.prefix!r})"


class Rehearsal:
    """Remembers, on disk, what an import would have brought, for as long as it is rehearsed."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._key = random(32)
        self._rows = sqlite3.connect("")  # a temporary file, of which only its end stays in memory
        self._rows.execute("CREATE TABLE rows (prefix PRIMARY KEY, account, proof) WITHOUT ROWID")
        self._rows.execute("CREATE INDEX by_account ON rows (account)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.close()

    def add(self, rows: Iterable[_Row]) -> None:
        """Remember *rows* as imported."""
        self._rows.executemany(
            "INSERT INTO rows VALUES (?, ?, ?)",
            [(row.prefix, row.account_id, self._mac(row)) for row in rows],
        )

    def find(self, row: _Row) -> ImportOutcome | None:
        """Return what would become of *row* by its prefix, if an earlier one had the same."""
        query = "SELECT account, proof FROM rows WHERE prefix = ?"
        earlier = self._rows.execute(query, (row.prefix,)).fetchone()
        if earlier is None:
            return None
        return _PRESENT if earlier == (row.account_id, self._mac(row)) else _collision()

    def count(self, account_id: str) -> int:
        """Return how many keys the account would have got."""
        query = "SELECT count(*) FROM rows WHERE account = ?"
        (count,) = self._rows.execute(query, (account_id,)).fetchone()
        return int(count)

    def _mac(self, row: _Row) -> bytes:
        return blake2b(row.proof, key=self._key, digest_size=16).digest()


class KeyImporter:
    """Takes over keys that were issued elsewhere: each verifies as it did there."""

    def __init__(
        self,
        *,
        store: Store,
        hashing: Hashing,
        tagger: Tagger,
        digest_keys: DigestKeys,
        scopes: ScopeRegistry,
        plans: Mapping[str, int],
        clock: Clock,
        random: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._hashing = hashing
        self._tagger = tagger
        self._digest_keys = digest_keys
        self._scopes = scopes
        self._plans = plans
        self._clock = clock
        self._random = random

    async def add(
        self,
        keys: Sequence[KeyToImport],
        *,
        beyond_plan: bool = False,
        actor: str | Actor = "application",
    ) -> list[ImportOutcome]:
        """Import *keys* in one transaction, and return what became of each, in their order.

        At most `BATCH` of them. One that is refused does not stop the others. With *beyond_plan*
        accounts may come to have more active keys than their plans allow. Raises `Unavailable`,
        and then none was imported (unless the connection broke in the middle of COMMIT); to import
        the same keys again does no harm.
        """
        checked = self._check_all(keys)
        for _ in range(_ATTEMPTS):
            decided, rows = await self._look_up(checked)
            hashed = await self._hash_tokens(rows)
            with contextlib.suppress(PrefixTaken):
                decided |= await self._insert(hashed, beyond_plan=beyond_plan, actor=actor)
                return [decided[position] for position in range(len(keys))]
        raise Unavailable(f"prefixes were taken meanwhile, {_ATTEMPTS} times in a row")

    def rehearsal(self) -> Rehearsal:
        """Return what remembers, as a context, the keys that were given to `rehearse`."""
        return Rehearsal(self._random)

    async def rehearse(
        self, keys: Sequence[KeyToImport], rehearsal: Rehearsal, *, beyond_plan: bool = False
    ) -> list[ImportOutcome]:
        """Return what would become of *keys* after those already in *rehearsal*; import none.

        Raises `Unavailable`.
        """
        decided, rows = await self._look_up(self._check_all(keys))
        decided |= {row.position: found for row in rows if (found := rehearsal.find(row))}
        rows = [row for row in rows if row.position not in decided]
        held = await self._store.read_holdings({row.account_id for row in rows})
        held = [one._replace(active=one.active + rehearsal.count(one.account_id)) for one in held]
        accepted, more = self._decide(rows, held, beyond_plan=beyond_plan)
        rehearsal.add(accepted)
        decided |= more
        return [decided[position] for position in range(len(keys))]

    def _check_all(self, keys: Sequence[KeyToImport]) -> "_Sorted":
        """Tell the keys that are fit to be imported from those that are not."""
        if len(keys) > BATCH:
            raise ValueError(f"expected at most {BATCH} keys, got {len(keys)}")
        decided: dict[int, ImportOutcome] = {}
        rows = []
        for position, key in enumerate(keys):
            try:
                rows.append(self._check(position, key))
            except InvalidInput as refusal:
                decided[position] = ImportOutcome("refused", refusal)
        return _Sorted(decided, rows)

    def _check(self, position: int, key: KeyToImport) -> _Row:
        """Return *key* as it is stored; raise `InvalidInput`, which never quotes what came.

        Columns may have been mixed up, and so a token may stand anywhere.
        """
        prefix, secret_hash, token = self._check_proof(key)
        for field, text in (("account_id", key.account_id), ("name", key.name)):
            if MARK.decode() in text:
                raise InvalidInput((field,), "token", "This looks like a token")
        check_id(key.account_id, field="account_id")
        name = plain_text(key.name, field="name", most=MAXIMUM_NAME_LENGTH)
        for number, scope in enumerate(key.scopes):
            if not is_scope(scope):
                raise InvalidInput(("scopes", number), "scope", f"This {NO_SCOPE}")
        scopes = self._scopes.grant(key.scopes)
        created_at = None if key.created_at is None else self._past(key.created_at)
        expires_at = None if key.expires_at is None else future(key.expires_at, self._clock)
        return _Row(
            position,
            prefix,
            key.account_id,
            name,
            scopes,
            created_at,
            expires_at,
            secret_hash,
            token,
        )

    def _check_proof(self, key: KeyToImport) -> tuple[str, str, bytes | None]:
        """Return prefix, hash and token, of which either the hash or the token is empty."""
        if (key.secret_hash is None) == (key.token is None):
            raise InvalidInput(("secret_hash",), "proof", "Either a hash or a token is needed")
        if key.token is not None:
            token = self._check_token(key.token)
            if key.prefix not in (None, prefix_of(token)):
                raise InvalidInput(("prefix",), "prefix", "This is not the token's prefix")
            return prefix_of(token), "", token
        if key.prefix is None or not is_prefix(key.prefix):
            raise InvalidInput(
                ("prefix",), "prefix", f"Expected {PREFIX_LENGTH} lowercase hexadecimal digits"
            )
        try:
            return key.prefix, read_hash(key.secret_hash or ""), None
        except ValueError as error:
            raise InvalidInput(("secret_hash",), "hash", str(error)) from None

    def _check_token(self, text: str) -> bytes:
        token = text.encode(errors="replace")
        if is_tagged(token):
            if not self._tagger.holds(token):
                raise InvalidInput(
                    ("token",), "tag", "It is mistyped, or was made by another installation"
                )
        elif not is_untagged(token):
            raise InvalidInput(
                ("token",), "token", "Expected tfm_k_ and 32, 40 or 48 lowercase hexadecimal digits"
            )
        return token

    def _past(self, created_at: datetime) -> datetime:
        created_at = in_utc(created_at, field="created_at")
        if created_at > self._clock.now():
            raise InvalidInput(("created_at",), "datetime_past", "The time must be in the past")
        return created_at

    async def _look_up(self, checked: "_Sorted") -> "_Sorted":
        """Decide about those whose prefix exists in the database; return the rest."""
        decided, rest = dict(checked.decided), []
        found = await self._store.find_keys({row.prefix for row in checked.rows})
        for row in checked.rows:
            stored = found.get(row.prefix)
            if stored is None:
                rest.append(row)
            else:
                same = await self._is_same(row, stored)
                decided[row.position] = _PRESENT if same else _collision()
        return _Sorted(decided, rest)

    async def _is_same(self, row: _Row, stored: StoredKey) -> bool:
        if row.account_id != stored.account_id:
            return False
        if row.token is None:
            return compare_digest(row.secret_hash.encode(), stored.secret_hash.encode())
        digest_key = self._digest_keys.by_id.get(stored.digest_key_id or "")
        if stored.digest is not None and digest_key is not None:
            return compare_digest(digest_key.digest(row.token), stored.digest)
        return await self._hashing.verify(stored.secret_hash, row.token)

    async def _hash_tokens(self, rows: Sequence[_Row]) -> list[_Row]:
        """Return *rows* with the hash of each that came with its token."""
        permits = asyncio.Semaphore(PERMITS)

        async def hashed(row: _Row) -> _Row:
            if row.token is None:
                return row
            async with permits:
                return row._replace(secret_hash=await self._hashing.hash(row.token))

        return await asyncio.gather(*map(hashed, rows))

    async def _insert(
        self, rows: Sequence[_Row], *, beyond_plan: bool, actor: str | Actor
    ) -> dict[int, ImportOutcome]:
        async def insert(transaction: Transaction) -> dict[int, ImportOutcome]:
            held = await transaction.lock_accounts({row.account_id for row in rows})
            accepted, decided = self._decide(rows, held, beyond_plan=beyond_plan)
            # In one order for all, or two imports might each wait for a prefix that the other has.
            accepted.sort(key=lambda row: row.prefix)
            new = [self._new_key(row, transaction.now, actor) for row in accepted]
            if new:
                await transaction.insert_keys(new)
            for one in new:
                await _audit(transaction, one.key, actor)
            return decided

        decided, _ = await self._store.transact(insert)
        return decided

    def _new_key(self, row: _Row, now: datetime, actor: str | Actor) -> NewKey:
        key = ApiKey(
            id=UUID(bytes=self._random(16), version=4),
            key_prefix=row.prefix,
            account_id=row.account_id,
            name=row.name,
            scopes=row.scopes,
            created_at=row.created_at or now,
            last_used_at=None,
            expires_at=row.expires_at,
            replaced_by=None,
        )
        current = self._digest_keys.current
        digest = None if row.token is None else current.digest(row.token)
        digest_key_id = None if row.token is None else current.id
        return NewKey(key, row.secret_hash, digest, digest_key_id, Actor.of(actor).name)

    def _decide(
        self, rows: Sequence[_Row], held: Iterable[Holding], *, beyond_plan: bool
    ) -> tuple[list[_Row], dict[int, ImportOutcome]]:
        """Return the rows to insert, and what becomes of each of *rows*, by its position."""
        holding = {one.account_id: one for one in held}
        more: Counter[str] = Counter()
        accepted: dict[str, _Row] = {}
        decided = {}
        for row in rows:
            earlier = accepted.get(row.prefix)
            if earlier is not None:
                same = (earlier.account_id, earlier.proof) == (row.account_id, row.proof)
                decided[row.position] = _PRESENT if same else _collision()
                continue
            account = holding[row.account_id]
            current = account.active + more[row.account_id]
            limit = self._plans.get(account.plan, self._plans["free"])
            if current >= limit and not beyond_plan:
                full = PlanLimitReached(plan=account.plan, limit=limit, current=current)
                decided[row.position] = ImportOutcome("refused", full)
                continue
            more[row.account_id] += 1
            accepted[row.prefix] = row
            decided[row.position] = _IMPORTED
        return list(accepted.values()), decided


class _Sorted(NamedTuple):
    """What became of some keys, by their position, and those that are not decided yet."""

    decided: dict[int, ImportOutcome]
    rows: list[_Row]


def _collision() -> ImportOutcome:
    message = "Another key has this prefix, and a prefix belongs to one key for good"
    return ImportOutcome("refused", InvalidInput(("prefix",), "prefix_taken", message))


async def _audit(transaction: Transaction, key: ApiKey, actor: str | Actor) -> None:
    await transaction.audit(
        account_id=key.account_id,
        actor=actor,
        action="api_key.imported",
        target_id=key.id,
        target_name=key.name,
        meta={"key_prefix": key.key_prefix, "permissions": sorted(key.scopes)},
    )
