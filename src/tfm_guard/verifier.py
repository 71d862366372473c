"""Verifying: from a token to the key that it proves, or a refusal."""

import logging
from hmac import compare_digest
from typing import Final

from tfm_guard.errors import InvalidToken, Unavailable
from tfm_guard.hashing import Hashing
from tfm_guard.records import KeyCredentials, StoredKey, VerifiedKey
from tfm_guard.store import Store
from tfm_guard.token import DigestKeys, Tagger, is_tagged, is_untagged, prefix_of

_log: Final = logging.getLogger(__name__)


class Verifier:
    """Verifies tokens against the store."""

    def __init__(
        self,
        *,
        store: Store,
        hashing: Hashing,
        tagger: Tagger,
        digest_keys: DigestKeys,
        realm: str,
        accept_untagged: bool,
    ) -> None:
        self._store = store
        self._hashing = hashing
        self._tagger = tagger
        self._digest_keys = digest_keys
        self._realm = realm
        self._accept_untagged = accept_untagged

    async def verify(self, token: bytes) -> VerifiedKey:
        """Return the key that *token* proves. Raises `InvalidToken` or `Unavailable`."""
        self._check_form(token)
        prefix = prefix_of(token)
        row = (await self._store.find_keys([prefix])).get(prefix)
        if row is None:
            raise InvalidToken("unknown prefix")
        await self._check_secret(row, token)
        _check_state(row)
        await self._renew_digest(row, token)
        return VerifiedKey(
            key_id=row.id,
            key_prefix=row.prefix,
            account_id=row.account_id,
            name=row.name,
            scopes=row.scopes,
            expires_at=row.expires_at,
            credentials=KeyCredentials(row.scopes, self._realm),
        )

    def _check_form(self, token: bytes) -> None:
        """Refuse what cannot be a key, before anything is asked about it."""
        if is_tagged(token):
            if not self._tagger.holds(token):
                raise InvalidToken("tag does not match")
        elif not (self._accept_untagged and is_untagged(token)):
            raise InvalidToken("not of the form of a key")

    async def _check_secret(self, row: StoredKey, token: bytes) -> None:
        """Compare by digest; only where the row's cannot be compared does argon2 decide."""
        known = self._digest_keys.by_id.get(row.digest_key_id or "")
        if row.digest is not None and known is not None:
            if not compare_digest(known.digest(token), row.digest):
                raise InvalidToken("wrong secret")
        elif not await self._hashing.verify(row.secret_hash, token):
            raise InvalidToken("wrong secret")

    async def _renew_digest(self, row: StoredKey, token: bytes) -> None:
        """Store the digest under the newest key, so that nothing slower is needed again."""
        current = self._digest_keys.current
        if row.digest is not None and row.digest_key_id == current.id:
            return
        try:
            await self._store.set_digest(row.id, current.digest(token), current.id)
        except Unavailable as error:
            # The key is proven; that the database takes no writes now is no reason to refuse it.
            _log.warning("a digest was not renewed: %s", error.reason)


def _check_state(row: StoredKey) -> None:
    if row.revoked_at is not None:
        raise InvalidToken("revoked")
    if row.suspended_at is not None:
        raise InvalidToken("account suspended")
    if row.expires_at is not None and row.expires_at <= row.read_at:
        raise InvalidToken("expired")
