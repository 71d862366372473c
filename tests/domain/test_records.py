"""Facts about the values that pass between the parts."""

from datetime import UTC, datetime
from uuid import UUID

import pytest
from starlette.authentication import AuthCredentials

from tfm_guard.records import ApiKey, CreatedKey, KeyCredentials, Revocation, StoredKey, VerifiedKey

ID = UUID("12345678-1234-4234-8234-123456789abc")
MOMENT = datetime(2030, 1, 1, tzinfo=UTC)
TOKEN = "tfm_k_00112233445566778899aabbccddeeff0011223344556677"
SCOPES = frozenset({"send", "domains:write"})


def an_api_key() -> ApiKey:
    """Return a key that never expires."""
    return ApiKey(
        id=ID,
        key_prefix="00112233",
        account_id="acme",
        name="CI",
        scopes=SCOPES,
        created_at=MOMENT,
        last_used_at=None,
        expires_at=None,
        replaced_by=None,
    )


def a_verified_key() -> VerifiedKey:
    """Return the same key as the caller of a request."""
    return VerifiedKey(
        key_id=ID,
        key_prefix="00112233",
        account_id="acme",
        name="CI",
        scopes=SCOPES,
        expires_at=None,
        credentials=KeyCredentials(SCOPES, "api"),
    )


def a_stored_key() -> StoredKey:
    """Return the same key's row."""
    return StoredKey(
        id=ID,
        prefix="00112233",
        account_id="acme",
        name="CI",
        scopes=SCOPES,
        secret_hash="$argon2id$hash",
        digest=b"sixteen bytes...",
        digest_key_id="0011223344556677",
        version=3,
        expires_at=None,
        revoked_at=None,
        suspended_at=None,
        read_at=MOMENT,
    )


def test_a_verified_key_is_a_starlette_user() -> None:
    """It has what Starlette asks of a user: it is authenticated, has a name and an identity."""
    key = a_verified_key()
    assert (key.is_authenticated, key.display_name, key.identity) == (True, "CI", str(ID))


def test_credentials_are_sorted_scopes() -> None:
    """What Starlette reads as `auth.scopes` is one sorted tuple."""
    credentials = a_verified_key().credentials
    assert isinstance(credentials, AuthCredentials)
    assert credentials.scopes == ("domains:write", "send")
    assert repr(credentials) == "KeyCredentials('domains:write send', realm='api')"


@pytest.mark.parametrize("name", ["scopes", "realm", "anything"])
def test_credentials_cannot_change(name: str) -> None:
    """No request can give its credentials, which others share, another scope or realm."""
    credentials = KeyCredentials(SCOPES, "api")
    with pytest.raises(AttributeError, match=name):
        setattr(credentials, name, ("api-keys:write",))
    assert credentials.scopes == ("domains:write", "send")


def test_a_verified_key_is_a_value() -> None:
    """Two requests with one key have equal callers, with equal hashes; another scope tells."""
    key = a_verified_key()
    assert key == a_verified_key()
    assert len({key, a_verified_key()}) == 1
    assert key.credentials != KeyCredentials(SCOPES, "another")
    assert key.credentials != KeyCredentials(frozenset({"send"}), "api")
    assert key.credentials != AuthCredentials(["domains:write", "send"])


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (an_api_key(), "scopes"),
        (a_verified_key(), "scopes"),
        (CreatedKey(token=TOKEN, key=an_api_key()), "token"),
        (Revocation(how="acknowledged", workers=0, seconds=0.1), "how"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_records_cannot_change(record: object, field: str) -> None:
    """A record that was handed out stays what it was."""
    with pytest.raises(AttributeError):
        setattr(record, field, None)


def test_no_repr_shows_a_secret() -> None:
    """Neither a token, nor a hash, nor a digest is in any record's repr; the prefix is."""
    created = CreatedKey(token=TOKEN, key=an_api_key())
    for record in (created, an_api_key(), a_verified_key(), a_stored_key()):
        assert "00112233" in repr(record)
        for hidden in (TOKEN, TOKEN[-8:], "argon2", "sixteen", "0011223344556677"):
            assert hidden not in repr(record)
