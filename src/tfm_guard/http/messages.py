"""What the management API reads and writes, as types, and how requests are read into them."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Final, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request

from tfm_guard.audit import DEFAULT_LIMIT, DEFAULT_RANGE, MAXIMUM_LIMIT
from tfm_guard.errors import InvalidInput, Refusal
from tfm_guard.keys import DEFAULT_GRACE, MAXIMUM_GRACE, MAXIMUM_NAME_LENGTH
from tfm_guard.records import (
    ApiKey,
    AuditRange,
    CreatedKey,
    KeyStatus,
    Moment,
    RotatedKey,
    UsageRange,
)
from tfm_guard.scopes import DEFAULT_SCOPES

T = TypeVar("T", bound=Struct)

MAXIMUM_BODY_BYTES: Final = 65_536
_DEFAULT_GRACE_SECONDS: Final = int(DEFAULT_GRACE.total_seconds())
_MAXIMUM_GRACE_SECONDS: Final = int(MAXIMUM_GRACE.total_seconds())

# How msgspec's messages about a field as such begin, and FastAPI's type and message for the same.
_FIELD_FAULTS: Final = (
    ("Object missing required field ", "missing", "Field required"),
    ("Object contains unknown field ", "extra_forbidden", "Extra inputs are not permitted"),
)

# What the key manager checks itself, with words of its own, is here for who reads the description.
KeyName = Annotated[
    str,
    Meta(
        description="Blanks around it are removed. Control and directional characters are refused.",
        extra_json_schema={"minLength": 1, "maxLength": MAXIMUM_NAME_LENGTH},
    ),
]
# No database has a text with a NUL in it. The longest text to compare with is an account's id.
Filter = Annotated[str, Meta(max_length=300, pattern="^[^\0]*$")]


class CreateKeyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/api-keys/`."""

    name: KeyName
    permissions: list[str] = msgspec.field(default_factory=lambda: list(DEFAULT_SCOPES))
    expires_at: Annotated[Moment | None, Meta(description="When the key ends: in the future.")] = (
        None
    )


class ChangeKeyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `PATCH /v1/api-keys/{id}`: a new name, the scopes that the key keeps, or both."""

    name: KeyName | UnsetType = UNSET
    permissions: list[str] | UnsetType = UNSET


class RotateKeyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/api-keys/{id}/rotate`."""

    grace_seconds: Annotated[
        int,
        Meta(
            ge=0,
            le=_MAXIMUM_GRACE_SECONDS,
            description="For how long the old key works on.",
        ),
    ] = _DEFAULT_GRACE_SECONDS


class UsageQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    """The query of `GET /v1/api-keys/{id}/usage`."""

    range: Annotated[UsageRange, Meta(description="How far back to count.")] = "24h"


class AuditQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    """The query of `GET /v1/audit-log`."""

    range: Annotated[AuditRange, Meta(description="How far back to list.")] = DEFAULT_RANGE
    limit: Annotated[
        int, Meta(ge=1, le=MAXIMUM_LIMIT, description="How many rows to list at most.")
    ] = DEFAULT_LIMIT
    category: Filter | UnsetType = UNSET
    action: Filter | UnsetType = UNSET
    actor: Filter | UnsetType = UNSET
    target_id: Filter | UnsetType = UNSET


class CreatedKeyResponse(Struct, kw_only=True):
    """A new key, this once with its token, which is `key`."""

    id: UUID
    name: str
    key: str
    key_prefix: str
    permissions: list[str]
    created_at: Moment
    expires_at: Moment | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key_prefix={self.key_prefix!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("key_prefix", self.key_prefix)]

    @classmethod
    def of(cls, created: CreatedKey) -> "CreatedKeyResponse":
        """Return what is answered for a key that was created."""
        return CreatedKeyResponse(**_created(created))


class RotatedKeyResponse(CreatedKeyResponse, kw_only=True):
    """A new key, this once with its token, and the key that it `replaces`.

    `confirmed` is false if some process may not know yet when the old key ends. Deleting that one
    waits for it.
    """

    replaces: UUID
    confirmed: bool

    @classmethod
    def of(cls, created: CreatedKey) -> "RotatedKeyResponse":
        """Return what is answered for a key that was rotated."""
        assert isinstance(created, RotatedKey)  # noqa: S101  # no other replaces a key
        confirmed = created.confirmed is not None
        return cls(**_created(created), replaces=created.replaces, confirmed=confirmed)


class KeyRow(Struct, kw_only=True):
    """An active key."""

    id: UUID
    name: str
    key_prefix: str
    permissions: list[str]
    is_active: bool
    last_used_at: Moment | None
    created_at: Moment
    expires_at: Moment | None
    replaced_by: UUID | None
    status: KeyStatus

    @classmethod
    def of(cls, key: ApiKey, status: KeyStatus) -> "KeyRow":
        """Return what is shown of *key*, of which *status* is to be said."""
        return cls(
            id=key.id,
            name=key.name,
            key_prefix=key.key_prefix,
            permissions=sorted(key.scopes),
            is_active=True,
            last_used_at=key.last_used_at,
            created_at=key.created_at,
            expires_at=key.expires_at,
            replaced_by=key.replaced_by,
            status=status,
        )


class BodyTooLarge(Refusal):
    """The request body is longer than any that makes sense here."""

    code = "body_too_large"
    status = 413

    def __init__(self) -> None:
        super().__init__(f"The body may have at most {MAXIMUM_BODY_BYTES} bytes.")


async def read_body(request: Request, kind: type[T], *, empty: T | None = None) -> T:
    """Return what the body says; *empty* if there is none."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BODY_BYTES:
            raise BodyTooLarge
    if not body and empty is not None:
        return empty
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _fault("body", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidInput(("body",), "json_invalid", "The body is not valid JSON") from None


def read_query(request: Request, kind: type[T]) -> T:
    """Return what the query says.

    What is not known is refused: a misspelt filter must not look like one that found everything.
    """
    parameters: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in parameters:
            raise InvalidInput(("query", name), "repeated", "Expected one value, got several")
        parameters[name] = value
    try:
        return msgspec.convert(parameters, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _fault("query", str(error)) from None


def read_key_id(request: Request) -> UUID:
    """Return the id of a key that the path has."""
    try:
        return UUID(request.path_params["key_id"])
    except ValueError:
        raise InvalidInput(
            ("path", "key_id"), "uuid_parsing", "Expected the id of a key, which is a UUID"
        ) from None


@contextlib.contextmanager
def fields_of_body() -> Iterator[None]:
    """Name refused values as the body of a request names them."""
    try:
        yield
    except InvalidInput as error:
        renamed = ("permissions" if part == "scopes" else part for part in error.field)
        raise InvalidInput(("body", *renamed), error.kind, error.message) from None


def _created(created: CreatedKey) -> dict[str, Any]:
    key = created.key
    return {
        "id": key.id,
        "name": key.name,
        "key": created.token,
        "key_prefix": key.key_prefix,
        "permissions": sorted(key.scopes),
        "created_at": key.created_at,
        "expires_at": UNSET if key.expires_at is None else key.expires_at,
    }


def _fault(place: str, text: str) -> InvalidInput:
    """Return what msgspec says in *text*, about a body or a query, as FastAPI would say it."""
    for start, kind, message in _FIELD_FAULTS:
        if text.startswith(start):
            # What follows is the field's name in backticks. The client may have chosen it.
            return InvalidInput((place, text[len(start) + 1 : -1]), kind, message)
    # Others read like this: Expected `str`, got `int` - at `$.permissions[0]`
    message, found, path = text.rpartition(" - at `$")
    if not found:  # it is the whole
        return InvalidInput((place,), "invalid", text)
    return InvalidInput((place, *_location(path)), "invalid", message)


def _location(path: str) -> tuple[str | int, ...]:
    parts = path.rstrip("`").replace("[", ".").replace("]", "").split(".")
    return tuple(int(part) if part.isdigit() else part for part in parts if part)
