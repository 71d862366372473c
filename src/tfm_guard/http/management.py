"""The management API: `/v1/api-keys/`, as programs and people manage the keys of an account."""

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tfm_guard.errors import (
    InsufficientScope,
    InvalidInput,
    MissingCredentials,
    NotAllowed,
    Refusal,
)
from tfm_guard.guard import Guard
from tfm_guard.http.middleware import APIKeyMiddleware
from tfm_guard.http.persons import Identify, check_origin
from tfm_guard.http.refusals import RefusalResponse, send_refusal
from tfm_guard.keys import DEFAULT_GRACE, MAXIMUM_GRACE, actor_of
from tfm_guard.records import Actor, ApiKey, CreatedKey, VerifiedKey
from tfm_guard.scopes import DEFAULT_SCOPES

T = TypeVar("T", bound=Struct)

MAXIMUM_BODY_BYTES: Final = 65_536
_DEFAULT_GRACE_SECONDS: Final = int(DEFAULT_GRACE.total_seconds())
_MAXIMUM_GRACE_SECONDS: Final = int(MAXIMUM_GRACE.total_seconds())

# Of X-Request-ID, what the audit log takes: printable ASCII.
_REQUEST_ID: Final = re.compile(r"[ -~]{1,128}")

# How msgspec's messages about a field as such begin, and FastAPI's type and message for the same.
_FIELD_FAULTS: Final = (
    ("Object missing required field ", "missing", "Field required"),
    ("Object contains unknown field ", "extra_forbidden", "Extra inputs are not permitted"),
)


class CreateKeyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/api-keys/`."""

    name: str
    permissions: list[str] = msgspec.field(default_factory=lambda: list(DEFAULT_SCOPES))
    expires_at: datetime | None = None


class ChangeKeyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `PATCH /v1/api-keys/{id}`: a new name, the scopes that the key keeps, or both."""

    name: str | UnsetType = UNSET
    permissions: list[str] | UnsetType = UNSET


class RotateKeyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/api-keys/{id}/rotate`."""

    grace_seconds: Annotated[int, Meta(ge=0, le=_MAXIMUM_GRACE_SECONDS)] = _DEFAULT_GRACE_SECONDS


class CreatedKeyResponse(Struct, kw_only=True):
    """What `POST /v1/api-keys/` answers: like rotating, a place where a token appears."""

    id: UUID
    name: str
    key: str
    key_prefix: str
    permissions: list[str]
    created_at: datetime
    expires_at: datetime | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"CreatedKeyResponse(key_prefix={self.key_prefix!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("key_prefix", self.key_prefix)]


class RotatedKeyResponse(CreatedKeyResponse, kw_only=True):
    """What rotating a key answers.

    *confirmed* is false if some process may not know yet when the key that this one *replaces*
    ends. Deleting that one waits for it.
    """

    replaces: UUID
    confirmed: bool


class KeyRow(Struct, kw_only=True):
    """A key in the list of `GET /v1/api-keys/`."""

    id: UUID
    name: str
    key_prefix: str
    permissions: list[str]
    is_active: bool
    last_used_at: datetime | None
    created_at: datetime
    expires_at: datetime | None
    replaced_by: UUID | None


class NotFound(Refusal):
    """Nothing is at this path."""

    code = "not_found"
    status = 404


class MethodNotAllowed(Refusal):
    """The path exists, for other methods."""

    code = "method_not_allowed"
    status = 405


class BodyTooLarge(Refusal):
    """The request body is longer than any that makes sense here."""

    code = "body_too_large"
    status = 413


class Caller(NamedTuple):
    """Who sent a request: a key, or a person who is signed in."""

    account_id: str
    actor: Actor
    key: VerifiedKey | None


class ManagementApp:
    """The ASGI app of the management API. Verifies its callers itself, wherever it is mounted.

    A request with an Authorization header is a key's. Any other is that of the person whom
    *identify* returns, if there is one.
    """

    def __init__(self, guard: Guard, identify: Identify | None) -> None:
        self._guard = guard
        self._identify = identify
        keys, key = "/v1/api-keys/", "/v1/api-keys/{key_id}"
        routes = [
            _route(keys, GET=self._list, POST=self._create),
            _route(f"{keys}self/revoke", POST=self._revoke_self),
            _route(key, PATCH=self._change, DELETE=self._delete),
            _route(f"{key}/rotate", POST=self._rotate),
        ]
        self._app = Starlette(
            routes=routes,
            exception_handlers={Refusal: self._refuse, HTTPException: self._refuse_route},
        )
        # The trailing slash is part of the path: clients do not follow a redirect of a POST.
        self._app.router.redirect_slashes = False
        self._app_for_keys = APIKeyMiddleware(self._app, guard=guard)

    def __repr__(self) -> str:
        return f"ManagementApp({self._guard!r})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._identify is None or scope["type"] != "http" or _has_credentials(scope):
            await self._app_for_keys(scope, receive, send)
            return
        try:
            person = await self._identify(HTTPConnection(scope))
            if person is None:
                raise MissingCredentials
            check_origin(HTTPConnection(scope))
        except Refusal as refusal:
            response = RefusalResponse(refusal, self._guard.settings.realm)
            await send_refusal(scope, receive, send, response)
            return
        await self._app({**scope, "user": person}, receive, send)

    async def _list(self, request: Request) -> Response:
        caller = _caller(request, "api-keys:read")
        keys = await self._guard.keys.list(caller.account_id)
        return _json(200, [_row(key) for key in keys])

    async def _create(self, request: Request) -> Response:
        caller = _caller(request, "api-keys:write")
        wanted = await _read(request, CreateKeyRequest)
        with _fields_of_body():
            created = await self._guard.keys.create(
                account_id=caller.account_id,
                name=wanted.name,
                scopes=wanted.permissions,
                expires_at=wanted.expires_at,
                actor=caller.actor,
                caller=caller.key,
            )
        return _json(201, CreatedKeyResponse(**_created(created)))

    async def _change(self, request: Request) -> Response:
        caller, key_id = _caller(request, "api-keys:write"), _key_id(request)
        wanted = await _read(request, ChangeKeyRequest)
        with _fields_of_body():
            key = await self._guard.keys.change(
                caller.account_id,
                key_id,
                name=None if wanted.name is UNSET else wanted.name,
                scopes=None if wanted.permissions is UNSET else wanted.permissions,
                actor=caller.actor,
            )
        return _json(200, _row(key))

    async def _rotate(self, request: Request) -> Response:
        caller, key_id = _caller(request, "api-keys:write"), _key_id(request)
        wanted = await _read(request, RotateKeyRequest, empty=RotateKeyRequest())
        rotated = await self._guard.keys.rotate(
            caller.account_id,
            key_id,
            grace=timedelta(seconds=wanted.grace_seconds),
            actor=caller.actor,
            caller=caller.key,
        )
        answer = RotatedKeyResponse(
            **_created(rotated),
            replaces=rotated.replaces,
            confirmed=rotated.confirmed is not None,
        )
        return _json(201, answer)

    async def _delete(self, request: Request) -> Response:
        caller, key_id = _caller(request, "api-keys:write"), _key_id(request)
        await self._guard.keys.revoke(caller.account_id, key_id, actor=caller.actor)
        return _no_content()

    async def _revoke_self(self, request: Request) -> Response:
        caller = _caller(request)
        if caller.key is None:
            raise MissingCredentials(reason="a person is no key")
        await self._guard.keys.revoke(caller.account_id, caller.key.key_id, actor=caller.actor)
        return _no_content()

    async def _refuse(self, _request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)  # noqa: S101  # this handler is registered for nothing else
        return RefusalResponse(error, self._guard.settings.realm)

    async def _refuse_route(self, _request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # as above
        refusal: Refusal = NotFound("There is nothing at this path.")
        if error.status_code == MethodNotAllowed.status:
            refusal = MethodNotAllowed("This path does not answer to this method.")
        response = RefusalResponse(refusal, self._guard.settings.realm)
        response.headers.update(error.headers or {})
        return response


def _route(path: str, **endpoints: Callable[[Request], Awaitable[Response]]) -> Route:
    """Return one route for all methods of a path, so that a 405 names all of them in Allow."""

    async def dispatch(request: Request) -> Response:
        # Starlette adds HEAD to GET.
        method = "GET" if request.method == "HEAD" else request.method
        return await endpoints[method](request)

    return Route(path, dispatch, methods=[*endpoints])


def _has_credentials(scope: Scope) -> bool:
    return any(name == b"authorization" for name, _ in scope["headers"])


def _caller(request: Request, needed: str | None = None) -> Caller:
    """Return who sent *request*, if the scope *needed* is theirs.

    Who is signed in may look; to do more, they must be one who may manage keys.
    """
    user = request.scope["user"]
    if isinstance(user, VerifiedKey):
        if needed is not None and needed not in user.scopes:
            raise InsufficientScope(frozenset({needed}))
        name, key = actor_of(user), user
    else:
        if not (user.may_manage or request.method in {"GET", "HEAD"}):
            raise NotAllowed
        name, key = f"person:{user.id}", None
    return Caller(user.account_id, Actor(name, _request_id(request)), key)


def _request_id(request: Request) -> str | None:
    """Return the id that a request came with, if that can be logged as it is."""
    match request.headers.getlist("x-request-id"):
        case [request_id] if _REQUEST_ID.fullmatch(request_id):
            return request_id
    return None


def _key_id(request: Request) -> UUID:
    try:
        return UUID(request.path_params["key_id"])
    except ValueError:
        raise InvalidInput(
            ("path", "key_id"), "uuid_parsing", "Expected the id of a key, which is a UUID"
        ) from None


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


def _no_content() -> Response:
    return Response(status_code=204, headers={"cache-control": "no-store"})


def _row(key: ApiKey) -> KeyRow:
    return KeyRow(
        id=key.id,
        name=key.name,
        key_prefix=key.key_prefix,
        permissions=sorted(key.scopes),
        is_active=True,
        last_used_at=key.last_used_at,
        created_at=key.created_at,
        expires_at=key.expires_at,
        replaced_by=key.replaced_by,
    )


def _json(status: int, content: Any) -> Response:
    return Response(
        msgspec.json.encode(content),
        status,
        {"cache-control": "no-store"},
        media_type="application/json",
    )


async def _read(request: Request, kind: type[T], *, empty: T | None = None) -> T:
    """Return what the body says; *empty* if there is none."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BODY_BYTES:
            raise BodyTooLarge(f"The body may have at most {MAXIMUM_BODY_BYTES} bytes.")
    if not body and empty is not None:
        return empty
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _fault(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidInput(("body",), "json_invalid", "The body is not valid JSON") from None


@contextlib.contextmanager
def _fields_of_body() -> Iterator[None]:
    """Name refused values as the body of a request names them."""
    try:
        yield
    except InvalidInput as error:
        renamed = ("permissions" if part == "scopes" else part for part in error.field)
        raise InvalidInput(("body", *renamed), error.kind, error.message) from None


def _fault(text: str) -> InvalidInput:
    """Return what msgspec says in *text* as FastAPI would say it."""
    for start, kind, message in _FIELD_FAULTS:
        if text.startswith(start):
            # What follows is the field's name in backticks. The client may have chosen it.
            return InvalidInput(("body", text[len(start) + 1 : -1]), kind, message)
    # Others read like this: Expected `str`, got `int` - at `$.permissions[0]`
    message, _, path = text.partition(" - at `$")
    return InvalidInput(("body", *_location(path)), "invalid", message)


def _location(path: str) -> tuple[str | int, ...]:
    parts = path.rstrip("`").replace("[", ".").replace("]", "").split(".")
    return tuple(int(part) if part.isdigit() else part for part in parts if part)
