"""The values that pass between the parts. All are immutable."""

import struct
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, NamedTuple, Self
from uuid import UUID

from msgspec import Meta, Struct
from starlette.authentication import AuthCredentials

# As the description of the management API has it.
Moment = Annotated[datetime, Meta(extra_json_schema={"format": "date-time"})]

# What happened to a key, as the feed of changes names it.
ChangeKind = Literal[
    "created", "renamed", "narrowed", "replaced", "suspended", "resumed", "revoked"
]

# What a row of the audit log can be about, and the one category that rows are in.
TargetType = Literal["API key", "account"]
SECURITY: Final = "Security"


class Actor(NamedTuple):
    """Who acts, as the audit log names it, and the id of the request in which that is, if any."""

    name: str
    request_id: str | None = None

    @classmethod
    def of(cls, actor: "str | Actor") -> "Actor":
        """Return *actor*, or what it is the name of."""
        return cls(actor) if isinstance(actor, str) else actor


# How far back the audit log is listed.
AuditRange = Literal["24h", "7d", "30d", "90d"]

# What there is to say about a key that is active, the most pressing first (signs.py).
KeyStatus = Literal["replaced", "expiring", "idle", "never_used", "ok"]


class AuditRow(Struct, frozen=True, kw_only=True):
    """A row of an account's audit log, as the management API shows it."""

    id: int
    actor: str
    action: str
    target_type: str
    target_name: str
    target_id: str
    category: str
    meta: dict[str, Any]
    request_id: str | None
    created_at: Moment


class AuditPage(Struct, frozen=True, kw_only=True):
    """The newest rows of an account's audit log within *range*, of *total* that there are."""

    items: list[AuditRow]
    range: AuditRange
    total: int


class AuditEvent(AuditRow, frozen=True, kw_only=True):
    """A row of the audit log, with the account that it is about."""

    account_id: str


class AuditEvents(Struct, frozen=True, kw_only=True):
    """Rows of the audit log in the order in which they were committed.

    What comes after them comes after *cursor*.
    """

    items: list[AuditEvent]
    cursor: int


class Looked(Struct, frozen=True, kw_only=True):
    """What a look for signs of trouble came to: *keys* looked at, and events written by kind."""

    keys: int
    idle: int
    expiring: int
    unusual_use: int


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


class Account(Struct, frozen=True, kw_only=True):
    """An account, and how many of the keys that its plan allows it holds."""

    id: str
    plan: str
    suspended_at: datetime | None
    active_keys: int


class Person(Struct, frozen=True, kw_only=True):
    """Who is signed in, as the host application says.

    A member of *account_id* sees its keys; who *may_manage* them also changes them. *id* is how the
    audit log names them.
    """

    account_id: str
    id: str
    may_manage: bool


class CreatedKey(Struct, frozen=True, kw_only=True):
    """A new key and, this once, its *token*."""

    token: str
    key: ApiKey

    def __repr__(self) -> str:
        return f"CreatedKey(token=<hidden>, key={self.key!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("key", self.key)]


class RotatedKey(CreatedKey, frozen=True, kw_only=True):
    """A new key, this once with its *token*, that takes the place of the key *replaces*.

    That one works on until *grace_ends_at*.

    *confirmed* tells how it was made sure that every process knows when the old key ends. It is
    none where that could not be shown in time: the token must not be lost for that. Revoking the
    old key waits for it, and ends the grace.
    """

    replaces: UUID
    grace_ends_at: datetime
    confirmed: "Revocation | None"

    def __repr__(self) -> str:
        return f"RotatedKey(token=<hidden>, key={self.key!r}, replaces={str(self.replaces)!r})"


class Revocation(Struct, frozen=True, kw_only=True):
    """How it was made sure that a key is refused everywhere, or is what it has become.

    *how* is "acknowledged" when every registered process has applied it, "lease" when some did not
    say so and their trust in what they remember has ended; *workers* counts the registered
    processes; *seconds* is how long it took.
    """

    how: Literal["acknowledged", "lease"]
    workers: int
    seconds: float


UsageRange = Literal["24h", "7d", "30d", "90d"]


class UsageBucket(Struct, frozen=True, kw_only=True):
    """How many requests of the hour, or the day, from *start* on were *accepted* and *refused*."""

    start: Moment  # UTC
    accepted: int
    refused: int


class KeyUsage(Struct, frozen=True, kw_only=True):
    """The use of a key over *range*, by hour or day: every one, the oldest first."""

    range: UsageRange
    unit: Literal["hour", "day"]
    accepted: int
    refused: int
    buckets: list[UsageBucket]


class Tally(Struct, gc=False):
    """Requests of one *hour*, counted from 1970, with the key *key_id*, that are yet to be added.

    *used_at* is when one was last accepted, in seconds of the database's clock since 1970.
    """

    key_id: bytes
    hour: int
    accepted: int = 0
    refused: int = 0
    used_at: float | None = None


class KeyCredentials(AuthCredentials):
    """What a verified key may do: its *scopes*, a sorted tuple, within *realm*. Immutable.

    *replaced* if the key works only for the grace after it was rotated.
    """

    scopes: tuple[str, ...]  # type: ignore[assignment]  # starlette has a list, which could change
    granted: frozenset[str]
    realm: str
    replaced: bool

    def __init__(self, scopes: frozenset[str], realm: str, *, replaced: bool = False) -> None:
        self.__dict__.update(
            scopes=tuple(sorted(scopes)), granted=scopes, realm=realm, replaced=replaced
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"credentials are shared between requests and cannot change {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"credentials are shared between requests and cannot lose {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyCredentials) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.scopes, self.realm, self.replaced))

    def __repr__(self) -> str:
        return f"KeyCredentials({' '.join(self.scopes)!r}, realm={self.realm!r})"


# digest, key id, prefix, which moments follow, bytes of account id; then come those moments, the
# account id and the name. Most keys have neither moment, and a million of them no room for none.
_RECORD: Final = struct.Struct(">16s16s8sBH")
_MOMENT: Final = struct.Struct(">q")  # microseconds from 1970
_EXPIRES: Final = 1
_REPLACED: Final = 2
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class VerifiedKey(Struct, frozen=True, gc=False):
    """The caller that a token proved to be; a protected app finds it in `scope["user"]`.

    It also has what Starlette expects of a user: `is_authenticated`, `display_name`, `identity`.

    Processes remember a great many of these, so all there is to say is packed into *record*, and
    unpacked by who asks.
    """

    record: bytes
    # The grants as Starlette wants them, in `scope["auth"]`: one object for all keys with the same.
    credentials: KeyCredentials

    @classmethod
    def pack(
        cls,
        *,
        digest: bytes,
        key_id: UUID,
        key_prefix: str,
        account_id: str,
        name: str,
        expires_at: datetime | None,
        replaced_at: datetime | None,
        credentials: KeyCredentials,
    ) -> Self:
        """Return the key made of these, with the *digest* of its token."""
        account = account_id.encode()
        moments, following = 0, b""
        if expires_at is not None:
            moments, following = _EXPIRES, _packed(expires_at)
        if replaced_at is not None:
            moments, following = moments | _REPLACED, following + _packed(replaced_at)
        head = _RECORD.pack(digest, key_id.bytes, key_prefix.encode(), moments, len(account))
        return cls(head + following + account + name.encode(), credentials)

    @property
    def key_id(self) -> UUID:
        return UUID(bytes=_RECORD.unpack_from(self.record)[1])

    @property
    def key_prefix(self) -> str:
        prefix: bytes = _RECORD.unpack_from(self.record)[2]
        return prefix.decode()

    @property
    def account_id(self) -> str:
        start, end = self._account
        return self.record[start:end].decode()

    @property
    def name(self) -> str:
        return self.record[self._account[1] :].decode()

    @property
    def scopes(self) -> frozenset[str]:
        return self.credentials.granted

    @property
    def expires_at(self) -> datetime | None:
        return self._moment(0) if self._moments & _EXPIRES else None

    @property
    def replaced_at(self) -> datetime | None:
        place = 1 if self._moments & _EXPIRES else 0
        return self._moment(place) if self._moments & _REPLACED else None

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return self.name

    @property
    def identity(self) -> str:
        return str(self.key_id)

    @property
    def _moments(self) -> int:
        moments: int = _RECORD.unpack_from(self.record)[3]
        return moments

    def _moment(self, place: int) -> datetime:
        start = _RECORD.size + place * _MOMENT.size
        microseconds: int = _MOMENT.unpack_from(self.record, start)[0]
        return _EPOCH + microseconds * _MICROSECOND

    @property
    def _account(self) -> tuple[int, int]:
        """Where in the record the account id begins and ends."""
        length: int = _RECORD.unpack_from(self.record)[4]
        start = _RECORD.size + self._moments.bit_count() * _MOMENT.size
        return start, start + length

    def __repr__(self) -> str:
        return (
            f"VerifiedKey(key_prefix={self.key_prefix!r}, account_id={self.account_id!r}, "
            f"scopes={' '.join(self.credentials.scopes)!r})"
        )


def _packed(moment: datetime) -> bytes:
    return _MOMENT.pack((moment - _EPOCH) // _MICROSECOND)


class CacheEntry(Struct, frozen=True, array_like=True, gc=False):
    """A key as the shared cache keeps it. Times are seconds of the database's clock since 1970."""

    sealed_at: float  # before the read that it comes from was sent
    version: int
    revoked: bool
    digest: bytes
    key_id: UUID
    account_id: str
    name: str
    scopes: tuple[str, ...]
    expires_at: datetime | None
    replaced_at: datetime | None

    def __repr__(self) -> str:
        return (
            f"CacheEntry(key_id={str(self.key_id)!r}, version={self.version}, "
            f"revoked={self.revoked}, sealed_at={self.sealed_at:.3f})"
        )


class Change(NamedTuple):
    """A row of the feed: *version* of the key with *prefix* came to be."""

    id: int
    kind: ChangeKind
    prefix: str
    version: int


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
    replaced_at: datetime | None
    revoked_at: datetime | None
    suspended_at: datetime | None
    read_at: datetime

    def __repr__(self) -> str:
        # A hash or digest is no secret to guess from, but nothing that ends up in logs needs it.
        return f"StoredKey(prefix={self.prefix!r}, version={self.version})"


class Explanation(Struct, frozen=True, kw_only=True):
    """What there is to say about a token: the key it proves, active or not, and why it is refused.

    *key* is none where it proves no key, *reason* where it is accepted.
    """

    key: StoredKey | None
    reason: str | None
