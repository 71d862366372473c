"""The management API: `/v1/api-keys/`, as programs and people manage the keys of an account."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import cached_property
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tfm_guard.errors import (
    InsufficientScope,
    InvalidToken,
    KeyNotFound,
    MissingCredentials,
    NotAllowed,
    Refusal,
    Unavailable,
)
from tfm_guard.guard import Guard
from tfm_guard.http.actors import actor_in
from tfm_guard.http.messages import (
    AuditQuery,
    ChangeKeyRequest,
    CreatedKeyResponse,
    CreateKeyRequest,
    KeyRow,
    RotatedKeyResponse,
    RotateKeyRequest,
    UsageQuery,
    fields_of_body,
    read_body,
    read_key_id,
    read_query,
)
from tfm_guard.http.middleware import APIKeyMiddleware, route_path
from tfm_guard.http.openapi import describe
from tfm_guard.http.persons import Identify, check_origin, identified
from tfm_guard.http.refusals import RefusalResponse, send_refusal
from tfm_guard.records import Actor, ApiKey, VerifiedKey

# The description of the API holds no secret, and is read before there is a key.
DESCRIPTION_PATH: Final = "/v1/openapi.json"


class NotFound(Refusal):
    """Nothing is at this path."""

    code = "not_found"
    status = 404


class MethodNotAllowed(Refusal):
    """The path exists, for other methods."""

    code = "method_not_allowed"
    status = 405


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
            _route(f"{key}/usage", GET=self._usage),
            _route("/v1/audit-log", GET=self._audit_log),
            _route(DESCRIPTION_PATH, GET=self._describe),
        ]
        self._app = Starlette(
            routes=routes,
            exception_handlers={Refusal: self._refuse, HTTPException: self._refuse_route},
        )
        # The trailing slash is part of the path: clients do not follow a redirect of a POST.
        self._app.router.redirect_slashes = False
        self._app_for_keys = APIKeyMiddleware(self._app, guard=guard, exempt=(DESCRIPTION_PATH,))

    def __repr__(self) -> str:
        return f"ManagementApp({self._guard!r})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._is_verified(scope):
            await self._app(scope, receive, send)
            return
        if self._identify is None or _is_for_keys(scope):
            await self._app_for_keys(scope, receive, send)
            return
        try:
            person = await identified(self._identify, HTTPConnection(scope))
            if person is None:
                raise MissingCredentials
            check_origin(HTTPConnection(scope))
            await self._guard.ready()
        except Refusal as refusal:
            response = RefusalResponse(refusal, self._guard.settings.realm)
            await send_refusal(scope, receive, send, response)
            return
        await self._app({**scope, "user": person}, receive, send)

    async def _is_verified(self, scope: Scope) -> bool:
        """Tell whether middleware around this app has verified the caller, by the same keys.

        Once is enough: a request verified twice would be counted twice.
        """
        user = scope.get("user")
        if scope["type"] != "http" or not isinstance(user, VerifiedKey):
            return False
        try:
            return await self._guard.holds(user)
        except Unavailable:
            return False  # which is then answered as ever

    async def _list(self, request: Request) -> Response:
        caller = _caller(request, "api-keys:read")
        keys = await self._guard.keys.list(caller.account_id)
        return _json(200, [self._row(key) for key in keys])

    async def _create(self, request: Request) -> Response:
        caller = _caller(request, "api-keys:write")
        wanted = await read_body(request, CreateKeyRequest)
        with fields_of_body():
            created = await self._guard.keys.create(
                account_id=caller.account_id,
                name=wanted.name,
                scopes=wanted.permissions,
                expires_at=wanted.expires_at,
                actor=caller.actor,
                caller=caller.key,
            )
        return _json(201, CreatedKeyResponse.of(created))

    async def _change(self, request: Request) -> Response:
        caller, key_id = _caller(request, "api-keys:write"), read_key_id(request)
        wanted = await read_body(request, ChangeKeyRequest)
        with fields_of_body():
            key = await self._guard.keys.change(
                caller.account_id,
                key_id,
                name=None if wanted.name is UNSET else wanted.name,
                scopes=None if wanted.permissions is UNSET else wanted.permissions,
                actor=caller.actor,
                caller=caller.key,
            )
        return _json(200, self._row(key))

    async def _rotate(self, request: Request) -> Response:
        caller, key_id = _caller(request, "api-keys:write"), read_key_id(request)
        wanted = await read_body(request, RotateKeyRequest, empty=RotateKeyRequest())
        rotated = await self._guard.keys.rotate(
            caller.account_id,
            key_id,
            grace=timedelta(seconds=wanted.grace_seconds),
            actor=caller.actor,
            caller=caller.key,
        )
        return _json(201, RotatedKeyResponse.of(rotated))

    async def _delete(self, request: Request) -> Response:
        caller, key_id = _caller(request, "api-keys:write"), read_key_id(request)
        await self._guard.keys.revoke(caller.account_id, key_id, actor=caller.actor)
        return _no_content()

    async def _revoke_self(self, request: Request) -> Response:
        caller = _caller(request)
        if caller.key is None:
            raise MissingCredentials(reason="a person is no key")
        try:
            await self._guard.keys.revoke(caller.account_id, caller.key.key_id, actor=caller.actor)
        except KeyNotFound:
            raise InvalidToken("revoked since it was verified") from None
        return _no_content()

    async def _usage(self, request: Request) -> Response:
        caller, key_id = _caller(request, "api-keys:read"), read_key_id(request)
        wanted = read_query(request, UsageQuery)
        usage = await self._guard.keys.usage(caller.account_id, key_id, range=wanted.range)
        return _json(200, usage)

    async def _audit_log(self, request: Request) -> Response:
        caller, wanted = _caller(request, "audit:read"), read_query(request, AuditQuery)
        given = msgspec.structs.asdict(wanted).items()
        page = await self._guard.audit.list(
            caller.account_id, **{name: value for name, value in given if value is not UNSET}
        )
        return _json(200, page)

    async def _describe(self, request: Request) -> Response:
        # Where the API is mounted differs, so that is not in the paths.
        servers = [{"url": request.scope.get("root_path") or "/"}]
        return _json(200, {**self._description, "servers": servers})

    @cached_property
    def _description(self) -> dict[str, Any]:
        return describe(self._guard.scopes, self._guard.settings.realm)

    def _row(self, key: ApiKey) -> KeyRow:
        return KeyRow.of(key, self._guard.keys.status(key))

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


def _is_for_keys(scope: Scope) -> bool:
    """Tell whether a request is no person's: it has credentials of its own, or needs none."""
    if scope["type"] != "http" or route_path(scope) == DESCRIPTION_PATH:
        return True
    return any(name == b"authorization" for name, _ in scope["headers"])


def _caller(request: Request, needed: str | None = None) -> Caller:
    """Return who sent *request*, if the scope *needed* is theirs.

    Who is signed in may look; to do more, they must be one who may manage keys.
    """
    user = request.scope["user"]
    if isinstance(user, VerifiedKey):
        if needed is not None and needed not in user.scopes:
            raise InsufficientScope(frozenset({needed}))
    elif not (user.may_manage or request.method in {"GET", "HEAD"}):
        raise NotAllowed
    key = user if isinstance(user, VerifiedKey) else None
    return Caller(user.account_id, actor_in(request, user), key)


def _no_content() -> Response:
    return Response(status_code=204, headers={"cache-control": "no-store"})


def _json(status: int, content: Any) -> Response:
    return Response(
        msgspec.json.encode(content),
        status,
        {"cache-control": "no-store"},
        media_type="application/json",
    )
