"""The management API: `/v1/api-keys/`, as programs create, list and delete keys."""

import re
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tfm_guard.errors import InvalidInput, Refusal
from tfm_guard.guard import Guard
from tfm_guard.http.middleware import APIKeyMiddleware
from tfm_guard.http.refusals import RefusalResponse
from tfm_guard.http.requires import requires
from tfm_guard.keys import actor_of
from tfm_guard.records import Actor, ApiKey, VerifiedKey
from tfm_guard.scopes import DEFAULT_SCOPES

T = TypeVar("T", bound=Struct)

MAXIMUM_BODY_BYTES: Final = 65_536

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


class CreatedKeyResponse(Struct, kw_only=True):
    """What `POST /v1/api-keys/` answers: the only place where the token appears."""

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


class ManagementApp:
    """The ASGI app of the management API. Verifies its callers itself, wherever it is mounted."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        app = Starlette(
            routes=[
                # One route for both methods, so that a 405 names both in Allow.
                Route("/v1/api-keys/", self._list_or_create, methods=["GET", "POST"]),
                Route("/v1/api-keys/{key_id}", self._delete, methods=["DELETE"]),
            ],
            exception_handlers={Refusal: self._refuse, HTTPException: self._refuse_route},
        )
        # The trailing slash is part of the path: clients do not follow a redirect of a POST.
        app.router.redirect_slashes = False
        self._app = APIKeyMiddleware(app, guard=guard)

    def __repr__(self) -> str:
        return f"ManagementApp({self._guard!r})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _list_or_create(self, request: Request) -> Response:
        answer = self._create if request.method == "POST" else self._list
        response: Response = await answer(request)
        return response

    @requires("api-keys:read")
    async def _list(self, request: Request) -> Response:
        keys = await self._guard.keys.list(_caller(request).account_id)
        return _json(200, [_row(key) for key in keys])

    @requires("api-keys:write")
    async def _create(self, request: Request) -> Response:
        caller = _caller(request)
        wanted = await _read(request, CreateKeyRequest)
        try:
            created = await self._guard.keys.create(
                account_id=caller.account_id,
                name=wanted.name,
                scopes=wanted.permissions,
                expires_at=wanted.expires_at,
                actor=_actor(request),
                caller=caller,
            )
        except InvalidInput as error:
            raise _in_body(error) from None
        key = created.key
        return _json(
            201,
            CreatedKeyResponse(
                id=key.id,
                name=key.name,
                key=created.token,
                key_prefix=key.key_prefix,
                permissions=sorted(key.scopes),
                created_at=key.created_at,
                expires_at=UNSET if key.expires_at is None else key.expires_at,
            ),
        )

    @requires("api-keys:write")
    async def _delete(self, request: Request) -> Response:
        caller = _caller(request)
        try:
            key_id = UUID(request.path_params["key_id"])
        except ValueError:
            raise InvalidInput(
                ("path", "key_id"), "uuid_parsing", "Expected the id of a key, which is a UUID"
            ) from None
        await self._guard.keys.revoke(caller.account_id, key_id, actor=_actor(request))
        return Response(status_code=204, headers={"cache-control": "no-store"})

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


def _caller(request: Request) -> VerifiedKey:
    key: VerifiedKey = request.scope["user"]
    return key


def _actor(request: Request) -> Actor:
    """Return who sent *request*, with the id that it came with, if that can be logged as it is."""
    match request.headers.getlist("x-request-id"):
        case [request_id] if _REQUEST_ID.fullmatch(request_id):
            return Actor(actor_of(_caller(request)), request_id)
    return Actor(actor_of(_caller(request)))


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
    )


def _json(status: int, content: Any) -> Response:
    return Response(
        msgspec.json.encode(content),
        status,
        {"cache-control": "no-store"},
        media_type="application/json",
    )


async def _read(request: Request, kind: type[T]) -> T:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BODY_BYTES:
            raise BodyTooLarge(f"The body may have at most {MAXIMUM_BODY_BYTES} bytes.")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _fault(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidInput(("body",), "json_invalid", "The body is not valid JSON") from None


def _in_body(error: InvalidInput) -> InvalidInput:
    """Return *error* with its field as the body of a request names it."""
    name, *rest = error.field
    field = ("body", "permissions" if name == "scopes" else name, *rest)
    return InvalidInput(field, error.kind, error.message)


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
