"""Facts about the values that pass between the parts."""

import gc
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from starlette.authentication import AuthCredentials

from tfm_guard.records import (
    ApiKey,
    CacheEntry,
    Change,
    CreatedKey,
    KeyCredentials,
    Revocation,
    StoredKey,
    VerifiedKey,
)
from tfm_guard.settings import Settings

ID = UUID("12345678-1234-4234-8234-123456789abc")
MOMENT = datetime(2030, 1, 1, tzinfo=UTC)
TOKEN = "tfm_k_00112233445566778899aabbccddeeff0011223344556677"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
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


def a_verified_key(expires_at: datetime | None = None) -> VerifiedKey:
    """Return the same key as the caller of a request."""
    return VerifiedKey.pack(
        digest=b"sixteen bytes...",
        key_id=ID,
        key_prefix="00112233",
        account_id="acme",
        name="CI",
        expires_at=expires_at,
        replaced_at=None,
        credentials=KeyCredentials(SCOPES, "api"),
    )


def an_entry(**values: Any) -> CacheEntry:
    """Return the same key as the shared cache has it, but for *values*."""
    entry: dict[str, Any] = {
        "sealed_at": 1_893_456_000.123456,
        "version": 3,
        "revoked": False,
        "digest": b"sixteen bytes...",
        "key_id": ID,
        "account_id": "acme",
        "name": "CI",
        "scopes": ("domains:write", "send"),
        "expires_at": None,
        "replaced_at": None,
    }
    return CacheEntry(**entry | values)


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
        replaced_at=None,
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
    assert (credentials.granted, credentials.realm) == (SCOPES, "api")
    assert repr(credentials) == "KeyCredentials('domains:write send', realm='api')"


@pytest.mark.parametrize("name", ["scopes", "granted", "realm", "anything"])
def test_credentials_cannot_change(name: str) -> None:
    """No request can give its credentials, which others share, another scope or realm."""
    credentials = KeyCredentials(SCOPES, "api")
    with pytest.raises(AttributeError, match=name):
        setattr(credentials, name, ("api-keys:write",))
    assert credentials.scopes == ("domains:write", "send")


# What UTF-8 can say, and so the database: no halves of surrogate pairs.
texts = st.text(st.characters(codec="utf-8"))
moments = st.none() | st.datetimes(timezones=st.just(UTC))


@example("acme", "CI", datetime.max.replace(tzinfo=UTC), None, ID, "00112233")
@example("", "", None, datetime.min.replace(tzinfo=UTC), ID, "ffffffff")
@example("\U0010ffff" * 255, "\U0010ffff" * 100, EPOCH - timedelta(0, 0, 1), EPOCH, ID, "00000000")
@given(
    texts,
    texts,
    moments,
    moments,
    st.uuids(),
    st.from_regex(r"[0-9a-f]{8}", fullmatch=True),
)
def test_a_verified_key_says_what_was_packed(  # noqa: PLR0917  # each is one thing that it says
    account_id: str,
    name: str,
    expires_at: datetime | None,
    replaced_at: datetime | None,
    key_id: UUID,
    key_prefix: str,
) -> None:
    """Any account, name and expiry, to the microsecond, come back as they were put in."""
    digest, credentials = bytes(range(16)), KeyCredentials(SCOPES, "api")
    key = VerifiedKey.pack(
        digest=digest,
        key_id=key_id,
        key_prefix=key_prefix,
        account_id=account_id,
        name=name,
        expires_at=expires_at,
        replaced_at=replaced_at,
        credentials=credentials,
    )
    assert (key.account_id, key.name, key.display_name) == (account_id, name, name)
    assert (key.key_id, key.identity, key.key_prefix) == (key_id, str(key_id), key_prefix)
    assert (key.expires_at, key.replaced_at) == (expires_at, replaced_at)
    assert key.record.startswith(digest)
    assert key.credentials is credentials
    assert key.scopes == SCOPES


@given(st.datetimes(timezones=st.timezones()))
def test_an_expiry_of_any_zone_is_the_same_moment(expires_at: datetime) -> None:
    """An expiry that was packed with a zone comes back in UTC."""
    assume(EPOCH.replace(year=2) < expires_at < EPOCH.replace(year=9999))
    unpacked = a_verified_key(expires_at).expires_at
    assert unpacked is not None
    # In UTC there is no hour that passes twice, in which equal times may be unequal.
    assert unpacked == expires_at.astimezone(UTC)
    assert unpacked.tzinfo is UTC


def test_a_verified_key_is_a_value() -> None:
    """Two requests with one key have equal callers, with equal hashes; another scope tells."""
    key = a_verified_key()
    assert key == a_verified_key()
    assert len({key, a_verified_key()}) == 1
    assert key != a_verified_key(MOMENT)
    assert key != VerifiedKey(key.record, KeyCredentials(frozenset({"send"}), "api"))
    assert key.credentials != KeyCredentials(SCOPES, "another")
    assert key.credentials != KeyCredentials(SCOPES, "api", replaced=True)
    assert key.credentials != KeyCredentials(frozenset({"send"}), "api")
    assert key.credentials != AuthCredentials(["domains:write", "send"])


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (an_api_key(), "scopes"),
        (a_verified_key(), "record"),
        (a_verified_key(), "scopes"),
        (an_entry(), "revoked"),
        (Change(1, "created", "00112233", 1), "version"),
        (CreatedKey(token=TOKEN, key=an_api_key()), "token"),
        (Revocation(how="acknowledged", workers=0, seconds=0.1), "how"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_records_cannot_change(record: object, field: str) -> None:
    """A record that was handed out stays what it was."""
    with pytest.raises(AttributeError):
        setattr(record, field, None)


@pytest.mark.parametrize("name", ["scopes", "granted", "realm", "anything"])
def test_credentials_cannot_lose_anything(name: str) -> None:
    """No request can take a scope or the realm away from credentials that others share."""
    credentials = a_verified_key().credentials
    before = dict(vars(credentials))
    with pytest.raises(AttributeError, match=name):
        delattr(credentials, name)
    assert vars(credentials) == before


def test_credentials_are_judged_by_scopes_and_realm() -> None:
    """Equal grants in one realm are equal, with equal hashes, in whatever order they were given."""
    one = KeyCredentials(frozenset({"a", "b"}), "api")
    other = KeyCredentials(frozenset({"b", "a"}), "api")
    assert one == other
    assert len({one, other, KeyCredentials(frozenset({"a"}), "api")}) == 2
    assert KeyCredentials(frozenset(), "api").scopes == ()


def test_a_verified_key_is_invisible_to_the_collector() -> None:
    """However many are remembered, the garbage collector does not walk them."""
    assert not gc.is_tracked(a_verified_key())


@given(
    st.builds(
        CacheEntry,
        sealed_at=st.floats(0, 1e11),
        version=st.integers(1, 2**63 - 1),
        revoked=st.booleans(),
        digest=st.binary(min_size=16, max_size=16),
        key_id=st.uuids(),
        account_id=texts,
        name=texts,
        scopes=st.lists(texts).map(tuple),
        expires_at=st.none() | st.datetimes(timezones=st.just(UTC)),
    )
)
def test_a_cache_entry_survives_its_encoding(entry: CacheEntry) -> None:
    """What is encoded for the shared cache is decoded to the same, to the microsecond."""
    encoded = msgspec.msgpack.encode(entry)
    assert msgspec.msgpack.decode(encoded, type=CacheEntry) == entry


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [1.0, 3, False, b"digest"],
        [*msgspec.structs.astuple(an_entry(revoked="no"))],
        [*msgspec.structs.astuple(an_entry(scopes="send"))],
        {"version": 3},
        None,
    ],
    ids=["none", "too few", "no boolean", "no list", "no array", "nothing"],
)
def test_another_shape_is_no_cache_entry(fields: object) -> None:
    """What has other fields is refused, not taken for something that it does not say."""
    encoded = msgspec.msgpack.encode(fields)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encoded, type=CacheEntry)


def test_no_repr_shows_a_secret() -> None:
    """Neither a token, nor a hash, nor a digest is in any record's repr; which key it is, is."""
    created = CreatedKey(token=TOKEN, key=an_api_key())
    for record in (created, an_api_key(), a_verified_key(), a_stored_key(), an_entry()):
        assert "00112233" in repr(record) or str(ID) in repr(record)
        for hidden in (TOKEN, TOKEN[-8:], "argon2", "sixteen", "0011223344556677"):
            assert hidden not in repr(record)


@pytest.mark.parametrize(
    "record",
    [
        CreatedKey(token=TOKEN, key=an_api_key()),
        Settings.load(
            {},
            database_url=f"postgresql://guard:{TOKEN}@localhost/keys",
            redis_url=f"redis://:{TOKEN}@localhost/0",
            secrets=[TOKEN],
        ),
    ],
    ids=lambda record: type(record).__name__,
)
def test_no_pretty_printer_shows_a_secret(record: Any) -> None:
    """What the library rich prints has no token, no URL with its password, and no root secret."""
    shown = repr(list(record.__rich_repr__()))
    assert TOKEN[-16:] not in shown
    assert "://" not in shown
