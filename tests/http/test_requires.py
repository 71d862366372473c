"""Endpoints that need certain scopes."""

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket

from tests.http.support import bearer, call, http_scope, make_guard, websocket_scope
from tfm_guard import APIKeyMiddleware, Guard, requires
from tfm_guard.errors import ConfigurationError


@requires("send")
async def asynchronous(request: Request) -> Response:
    """Answer asynchronously."""
    return PlainTextResponse(request.user.name)


@requires("send")
def synchronous(request: Request) -> Response:
    """Answer synchronously."""
    return PlainTextResponse(request.user.name)


@requires(["send", "domains:read"])
async def several(request: Request) -> Response:
    """Answer to keys with two scopes."""
    return PlainTextResponse(request.user.name)


@requires([])
async def any_key(request: Request) -> Response:
    """Answer to every key."""
    return PlainTextResponse(request.user.name)


class ByClass(HTTPEndpoint):
    """An endpoint as a class, with a scope for each method."""

    @requires("send")
    async def post(self, request: Request) -> Response:
        return PlainTextResponse(request.user.name)

    @requires("domains:read")
    def get(self, request: Request) -> Response:
        return PlainTextResponse(request.user.name)


@requires("send")
async def by_websocket(websocket: WebSocket) -> None:
    """Accept the WebSocket and say who calls."""
    await websocket.accept()
    await websocket.send_text(websocket.user.name)
    await websocket.close()


APP = Starlette(
    routes=[
        Route("/asynchronous", asynchronous),
        Route("/synchronous", synchronous),
        Route("/several", several),
        Route("/any", any_key),
        Route("/class", ByClass),
        WebSocketRoute("/websocket", by_websocket),
    ]
)


async def token_for(guard: Guard, *scopes: str) -> list[tuple[bytes, bytes]]:
    """Create a key with *scopes* and return the header that carries its token."""
    created = await guard.keys.create(account_id="acme", name="CI", scopes=scopes)
    return bearer(created.token)


async def connect(app: Any, headers: list[tuple[bytes, bytes]], *, denial: bool) -> list[Message]:
    """Open a WebSocket and return what the app sends."""
    incoming: list[Message] = [{"type": "websocket.connect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop()

    async def send(message: Message) -> None:
        sent.append(dict(message))

    await app(websocket_scope(headers, path="/websocket", denial=denial), receive, send)
    return sent


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/asynchronous", ["send"]),
        ("GET", "/synchronous", ["send"]),
        ("GET", "/several", ["domains:read", "send"]),
        ("POST", "/class", ["send"]),
        ("GET", "/class", ["domains:read"]),
    ],
)
async def test_every_kind_of_endpoint(
    guard: Guard, method: str, path: str, needed: list[str]
) -> None:
    """A key with all the scopes gets in; the challenge to one without names what is missing."""
    app = APIKeyMiddleware(APP, guard=guard)
    good = await token_for(guard, *needed)
    answer = await call(app, http_scope(method, path, good))
    assert (answer.status, answer.body) == (200, b"CI")
    bad = await token_for(guard, "emails:read")
    answer = await call(app, http_scope(method, path, bad))
    assert (answer.status, answer.code) == (403, "insufficient_scope")
    assert answer.header("cache-control") == "no-store"
    assert answer.header("www-authenticate") == (
        f'Bearer realm="api", error="insufficient_scope", scope="{" ".join(needed)}"'
    )
    assert answer.json["detail"]["message"] == f"This key lacks the scope: {' '.join(needed)}"


async def test_one_of_several_scopes_is_not_enough(guard: Guard) -> None:
    """The challenge asks for those scopes alone that the key lacks, in the realm of the host."""
    app = APIKeyMiddleware(APP, guard=guard)
    answer = await call(app, http_scope(path="/several", headers=await token_for(guard, "send")))
    assert answer.status == 403
    assert answer.header("www-authenticate") == (
        'Bearer realm="api", error="insufficient_scope", scope="domains:read"'
    )


async def test_no_scope_implies_another(guard: Guard) -> None:
    """Writing does not include reading, nor does anything include everything."""
    app = APIKeyMiddleware(APP, guard=guard)
    others = set(guard.scopes.descriptions) - {"domains:read"}
    answer = await call(app, http_scope(path="/class", headers=await token_for(guard, *others)))
    assert (answer.status, answer.code) == (403, "insufficient_scope")


async def test_no_scope_needed_is_any_key(guard: Guard) -> None:
    """An endpoint that needs no scope still needs a key, and any will do."""
    headers = await token_for(guard)
    app = APIKeyMiddleware(APP, guard=guard, exempt=("/any",))
    assert (await call(app, http_scope(path="/any"))).status == 401
    everything = APIKeyMiddleware(APP, guard=guard)
    assert (await call(everything, http_scope(path="/any", headers=headers))).status == 200


@pytest.mark.parametrize("user", [None, object(), {"scopes": ["send"]}])
@pytest.mark.parametrize("path", ["/asynchronous", "/synchronous", "/class", "/any"])
async def test_outside_a_protected_app(path: str, user: object) -> None:
    """Where no key was verified, nobody is let in, whoever else may stand in the scope."""
    scope = http_scope(path=path)
    if user is not None:
        scope.update(user=user, auth=user)
    answer = await call(APP, scope)
    assert (answer.status, answer.code) == (401, "missing_credentials")
    assert answer.header("www-authenticate") == 'Bearer realm="api"'


async def test_a_websocket_endpoint(guard: Guard) -> None:
    """With the scope it is accepted; without it, refused with an answer or closed with 1008."""
    app = APIKeyMiddleware(APP, guard=guard)
    good, bad = await token_for(guard, "send"), await token_for(guard, "domains:read")
    accepted = await connect(app, good, denial=True)
    assert [message["type"] for message in accepted] == [
        "websocket.accept", "websocket.send", "websocket.close",
    ]  # fmt: skip
    assert accepted[1]["text"] == "CI"
    start, body = await connect(app, bad, denial=True)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 403)
    challenge = b'Bearer realm="api", error="insufficient_scope", scope="send"'
    assert (b"www-authenticate", challenge) in list(start["headers"])
    assert b'"insufficient_scope"' in body["body"]
    (closed,) = await connect(app, bad, denial=False)
    assert (closed["type"], closed["code"]) == ("websocket.close", 1008)


async def test_a_websocket_endpoint_outside_a_protected_app() -> None:
    """Where no key was verified, a WebSocket is refused as one without a key."""
    start, _ = await connect(APP, [], denial=True)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert (b"www-authenticate", b'Bearer realm="api"') in list(start["headers"])


async def test_the_realm_is_the_host_s(sqlite_url: str) -> None:
    """The challenge of an endpoint names the same realm as that of the middleware."""
    async with make_guard(sqlite_url, realm="mail") as guard:
        app = APIKeyMiddleware(APP, guard=guard)
        headers = await token_for(guard, "domains:read")
        answer = await call(app, http_scope(path="/asynchronous", headers=headers))
    assert answer.header("www-authenticate") == (
        'Bearer realm="mail", error="insufficient_scope", scope="send"'
    )


def test_an_endpoint_keeps_its_name() -> None:
    """The decorated endpoint is known by the name and the docstring of the original."""
    assert asynchronous.__name__ == "asynchronous"
    assert asynchronous.__doc__ == "Answer asynchronously."
    assert synchronous.__name__ == "synchronous"


def test_an_endpoint_must_take_its_request() -> None:
    """A function from which the caller cannot be learned is told at once."""
    with pytest.raises(ConfigurationError, match="'request' or 'websocket'"):

        @requires("send")
        def endpoint(_something: str) -> None: ...

    with pytest.raises(ConfigurationError, match="'request' or 'websocket'"):

        @requires("send")
        async def asynchronous_endpoint() -> None: ...


@pytest.mark.parametrize("scopes", ["", "nope with blank", "Send", ["send", "a:b:c"], [""]])
def test_what_is_no_scope_is_told_at_once(scopes: str | list[str]) -> None:
    """A scope that no key can have is refused when the endpoint is decorated."""
    with pytest.raises(ConfigurationError, match="is no scope: use lowercase letters"):
        requires(scopes)


class Callable:
    """An object that can be called like an endpoint."""

    async def __call__(self, request: Request) -> Response:
        return PlainTextResponse(request.user.name)


def test_an_object_is_no_endpoint() -> None:
    """An object that can be called is refused: frameworks do not call it as they do functions."""
    with pytest.raises(ConfigurationError, match="decorate a function or a method"):
        requires("send")(Callable())


def test_a_websocket_endpoint_must_be_able_to_refuse() -> None:
    """Refused are a sync WebSocket endpoint, and methods that come after the handshake."""
    with pytest.raises(ConfigurationError, match="must be async"):

        @requires("send")
        def synchronous_endpoint(websocket: WebSocket) -> None: ...

    with pytest.raises(ConfigurationError, match="decorate on_connect"):

        class Late(WebSocketEndpoint):
            @requires("send")
            async def on_receive(self, websocket: WebSocket, data: str) -> None: ...


async def test_a_websocket_that_was_accepted_is_closed(guard: Guard) -> None:
    """Where the endpoint is called after the handshake, a key without the scope gets 1008."""

    async def accept_first(websocket: WebSocket) -> None:
        await websocket.accept()
        await by_websocket(websocket)

    app = Starlette(routes=[WebSocketRoute("/websocket", accept_first)])
    bad = await token_for(guard, "domains:read")
    accepted, closed = await connect(APIKeyMiddleware(app, guard=guard), bad, denial=True)
    assert accepted["type"] == "websocket.accept"
    assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
