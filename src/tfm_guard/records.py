"""The values that pass between the parts. All are immutable."""

from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from msgspec import Struct
from starlette.authentication import AuthCredentials

# What happened to a key, as the feed of changes names it.
ChangeKind = Literal["created", "revoked"]


class ApiKey(Struct, frozen=True, kw_only=True):
    """A managed key as its account sees it; the token itself is nowhere in it."""

    id: UUID
    key_prefix: str
    account_id: str
    name: str
    scopes: frozenset[str]
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    replaced_by: UUID | None


class CreatedKey(Struct, frozen=True, kw_only=True):
    """A new key and, this once, its *token*."""

    token: str
    key: ApiKey

    def __repr__(self) -> str:
        return f"CreatedKey(token=<hidden>, key={self.key!r})"


class Revocation(Struct, frozen=True, kw_only=True):
    """How it was made sure that a key is refused everywhere.

    *how* is "acknowledged" when every process that caches has confirmed it; *workers* counts
    those processes; *seconds* is how long it took.
    """

    how: Literal["acknowledged", "lease"]
    workers: int
    seconds: float


class KeyCredentials(AuthCredentials):
    """What a verified key may do: its *scopes*, a sorted tuple, within *realm*. Immutable."""

    scopes: tuple[str, ...]  # type: ignore[assignment]  # starlette has a list, which could change
    realm: str

    def __init__(self, scopes: frozenset[str], realm: str) -> None:
        self.__dict__["scopes"] = tuple(sorted(scopes))
        self.__dict__["realm"] = realm

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"credentials are shared between requests and cannot change {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyCredentials) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.scopes, self.realm))

    def __repr__(self) -> str:
        return f"KeyCredentials({' '.join(self.scopes)!r}, realm={self.realm!r})"


class VerifiedKey(Struct, frozen=True, kw_only=True, gc=False):
    """The caller that a token proved to be; a protected app finds it in `scope["user"]`.

    It also has what Starlette expects of a user: `is_authenticated`, `display_name`, `identity`.
    """

    key_id: UUID
    key_prefix: str
    account_id: str
    name: str
    scopes: frozenset[str]
    expires_at: datetime | None
    # The same grants as Starlette wants them, in `scope["auth"]`: made once for all requests.
    credentials: KeyCredentials

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return self.name

    @property
    def identity(self) -> str:
        return str(self.key_id)


class StoredKey(NamedTuple):
    """A key's row as verifying needs it, *read_at* the database's own time."""

    id: UUID
    prefix: str
    account_id: str
    name: str
    scopes: frozenset[str]
    secret_hash: str
    digest: bytes | None
    digest_key_id: str | None
    version: int
    expires_at: datetime | None
    revoked_at: datetime | None
    suspended_at: datetime | None
    read_at: datetime

    def __repr__(self) -> str:
        # A hash or digest is no secret to guess from, but nothing that ends up in logs needs it.
        return f"StoredKey(prefix={self.prefix!r}, version={self.version})"
