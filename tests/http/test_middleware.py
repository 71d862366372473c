"""What passes the middleware, what does not, and how it is told."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import websockets
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, event
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.http.support import Answer, bearer, call, http_scope, make_guard, websocket_scope
from tests.support.guards import prepare
from tests.support.sql import execute
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard import APIKeyMiddleware, Guard, VerifiedKey
from tfm_guard.errors import ConfigurationError, InvalidToken
from tfm_guard.settings import Settings
from tfm_guard.testing import CHEAP_HASHING, ManualClock

MISSING_BODY: Final = (
    b'{"detail":{"code":"missing_credentials","message":"This request needs an API key. '
    b'Send it as: Authorization: Bearer <key>"}}'
)


class App:
    """An app that keeps the scopes it is called with, and answers in plain text."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            await PlainTextResponse("here")(scope, receive, send)


async def test_the_app_learns_who_calls(guard: Guard, token: str) -> None:
    """In the scope stand the verified key as user and its scopes as auth."""
    app = App()
    assert (await call(APIKeyMiddleware(app, guard=guard), http_scope(headers=bearer(token)))) == (
        Answer(
            200,
            ((b"content-length", b"4"), (b"content-type", b"text/plain; charset=utf-8")),
            b"here",
        )
    )
    (scope,) = app.scopes
    (key,) = await guard.keys.list("acme")
    user, auth = scope["user"], scope["auth"]
    assert isinstance(user, VerifiedKey)
    assert (user.key_id, user.account_id, user.name) == (key.id, "acme", "CI")
    assert user.scopes == {"send", "domains:read"}
    assert (user.is_authenticated, user.display_name, user.identity) == (True, "CI", str(key.id))
    assert auth.scopes == ("domains:read", "send")
    request = Request(scope)
    assert request.user is user
    assert request.auth is auth


async def test_who_calls_cannot_be_changed(guard: Guard, token: str) -> None:
    """Neither the user nor its grants can be altered by an app, for other requests to see."""
    key = await guard.verify(token)
    with pytest.raises(AttributeError):
        key.scopes = frozenset({"api-keys:write"})  # type: ignore[misc]
    with pytest.raises(AttributeError):
        key.credentials.scopes = ("api-keys:write",)
    with pytest.raises(AttributeError):
        key.credentials.scopes.append("api-keys:write")  # type: ignore[attr-defined]


async def test_a_refusal_says_what_is_missing(guard: Guard) -> None:
    """Without a key the answer is 401, whole, and the app is not called."""
    app = App()
    assert await call(APIKeyMiddleware(app, guard=guard), http_scope()) == Answer(
        401,
        (
            (b"cache-control", b"no-store"),
            (b"www-authenticate", b'Bearer realm="api"'),
            (b"content-length", b"%d" % len(MISSING_BODY)),
            (b"content-type", b"application/json"),
        ),
        MISSING_BODY,
    )
    assert app.scopes == []


async def test_the_realm_is_the_host_s(sqlite_url: str) -> None:
    """Challenges name the realm of the settings."""
    app = APIKeyMiddleware(App(), guard=make_guard(sqlite_url, realm="mail, EU"))
    answer = await call(app, http_scope())
    assert answer.header("www-authenticate") == 'Bearer realm="mail, EU"'


@pytest.mark.parametrize("headers", [[], bearer("x"), [*bearer("x"), *bearer("x")]])
async def test_head_is_answered_like_get_without_the_body(
    guard: Guard, headers: list[tuple[bytes, bytes]]
) -> None:
    """A refused HEAD has the status and headers of the GET, and no body."""
    app = APIKeyMiddleware(App(), guard=guard)
    get = await call(app, http_scope("GET", headers=headers))
    head = await call(app, http_scope("HEAD", headers=headers))
    assert head == get._replace(body=b"")
    assert get.body


@pytest.mark.parametrize("kind", ["http3", "webtransport", "", "HTTP", "lifespan ", None])
async def test_unknown_connections_are_never_forwarded(guard: Guard, kind: str | None) -> None:
    """A connection of a type that is not known here raises, with or without a key."""
    app = App()
    scope = http_scope(path="/health", headers=bearer("x"), type=kind)
    with pytest.raises(ValueError, match="cannot guard a connection of type"):
        await call(APIKeyMiddleware(app, guard=guard, exempt=("/health",)), scope)
    assert app.scopes == []


@pytest.mark.parametrize("error", [RuntimeError("broken"), InvalidToken("from the app")])
async def test_errors_of_the_app_pass_untouched(guard: Guard, token: str, error: Exception) -> None:
    """What the protected app raises is not the middleware's to answer, not even a refusal."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        await call(APIKeyMiddleware(app, guard=guard), http_scope(headers=bearer(token)))
    assert raised.value is error


async def test_a_fault_of_ours_is_503(
    guard: Guard, token: str, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that cannot be read lets nobody through, is no 500, and is told once in the log."""
    app = App()
    guarded = APIKeyMiddleware(app, guard=guard)
    execute(sqlite_url, "UPDATE tfm_keys SET expires_at = 'whenever'")
    for _ in range(3):
        answer = await call(guarded, http_scope(headers=bearer(token)))
        assert (answer.status, answer.code) == (503, "unavailable")
        assert answer.header("www-authenticate") is None
        assert int(answer.header("retry-after") or "") > 0
        mistyped = await call(guarded, http_scope(headers=bearer(token[:-1])))
        assert (mistyped.status, mistyped.code) == (401, "invalid_token")
    assert app.scopes == []
    execute(sqlite_url, "UPDATE tfm_keys SET expires_at = NULL")
    assert (await call(guarded, http_scope(headers=bearer(token)))).status == 200
    told = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert told == ["1 tokens could not be verified, the last: ValueError"]


async def test_an_outage_is_one_line(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """200 tokens that cannot be verified write one line, and another one 10 s later."""
    clock = ManualClock()
    settings = Settings.load({}, database_url=await prepare(sqlite_url), **CHEAP_HASHING)
    async with Guard(settings, clock=clock) as guard:
        created = await guard.keys.create(account_id="acme", name="CI")
        execute(sqlite_url, "ALTER TABLE tfm_keys RENAME TO tfm_away")
        guarded = APIKeyMiddleware(App(), guard=guard)

        async def told() -> list[str]:
            caplog.clear()
            for _ in range(200):
                answer = await call(guarded, http_scope(headers=bearer(created.token)))
                assert answer.status == 503
            records = [record for record in caplog.records if record.levelno > logging.INFO]
            return [record.getMessage() for record in records]

        cause = "the last: database: OperationalError: no such table: tfm_keys"
        assert await told() == [f"1 tokens could not be verified, {cause}"]
        clock.advance(9.9)
        assert await told() == []
        clock.advance(0.2)
        assert await told() == [f"400 tokens could not be verified, {cause}"]


async def test_another_file_in_its_place_is_no_database(sqlite_url: str, tmp_path: Path) -> None:
    """With its file moved away, or another there, a valid key gets 503, and 200 when it is back."""
    # Nothing is remembered, and no connection stays open.
    await prepare(sqlite_url, lease=0)
    file, away, elsewhere = (tmp_path / name for name in ("tfm_guard.db", "away", "elsewhere"))
    for folder in (away, elsewhere):
        folder.mkdir()

    def move(source: Path, target: Path) -> None:
        for path in source.glob("tfm_guard.db*"):
            path.rename(target / path.name)

    async with make_guard(sqlite_url) as guard:
        created = await guard.keys.create(account_id="acme", name="CI")
        guarded = APIKeyMiddleware(App(), guard=guard)

        async def status() -> int:
            return (await call(guarded, http_scope(headers=bearer(created.token)))).status

        assert await status() == 200
        move(tmp_path, away)
        assert await status() == 503
        assert not file.exists()
        async with make_guard(sqlite_url) as other:
            await other.keys.create(account_id="acme", name="CI")
            assert await status() == 503
        assert await status() == 503
        move(tmp_path, elsewhere)
        move(away, tmp_path)
        assert await status() == 200


async def test_a_server_that_takes_no_writes_stops_the_start(postgres_url: str) -> None:
    """A database that is read-only is refused at the start, with what it says."""
    async with make_guard(postgres_url) as guard:
        await guard.keys.create(account_id="acme", name="CI")
    name = postgres_url.rpartition("/")[2]
    execute(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    lifespan = Lifespan(APIKeyMiddleware(App(), guard=make_guard(postgres_url)))
    task = asyncio.create_task(lifespan.run())
    answer = await lifespan.tell("lifespan.startup")
    await task
    assert answer["type"] == "lifespan.startup.failed"
    assert "read-only transaction" in answer["message"]


@pytest.mark.parametrize("exempt", ["/health", ("health",), ("/health", "")])
def test_exempt_paths_are_checked(sqlite_url: str, exempt: Any) -> None:
    """A string instead of a list, or a path that can never match, is told at once."""
    with pytest.raises(ConfigurationError, match="exempt"):
        APIKeyMiddleware(App(), guard=make_guard(sqlite_url), exempt=exempt)


def router(reached: list[str]) -> Router:
    """Return a real router whose endpoints note that they were reached."""

    def endpoint(name: str) -> Any:
        async def note(_request: Request) -> Response:
            reached.append(name)
            return PlainTextResponse(name)

        return note

    return Router(
        [
            Route("/health", endpoint("health")),
            Route("/v1/open", endpoint("open")),
            Mount("/v1", routes=[Route("/health", endpoint("v1 health"))]),
            Mount("/health", routes=[Route("/{rest:path}", endpoint("below health"))]),
            Route("/{rest:path}", endpoint("rest")),
        ]
    )


SEGMENTS = st.sampled_from(
    ["health", "open", "v1", "v", "api", "", ".", "..", "HEALTH", "health\n", "health?", "h%65alth"]
)
PATHS = st.builds(
    lambda start, segments: start + "/".join(segments),
    st.sampled_from(["/", "/", "/", "//", ""]),
    st.lists(SEGMENTS, max_size=4),
)
ROOTS = st.one_of(st.just(""), PATHS)


@given(
    root=ROOTS,
    path=st.one_of(PATHS, st.sampled_from(["/health", "/v1/open"])),
    joined=st.booleans(),
)
def test_exempt_is_only_what_the_router_takes_for_it(root: str, path: str, *, joined: bool) -> None:
    """Without a key no endpoint is reached but those at the exempt paths, under any root path."""
    reached: list[str] = []
    app = APIKeyMiddleware(router(reached), guard=GUARD, exempt=("/health", "/v1/open"))
    scope = http_scope(path=root + path if joined else path, root_path=root)
    answer = asyncio.run(call(app, scope))
    assert set(reached) <= {"health", "open"}
    assert answer.status == (200 if reached else 401)
    if joined and path in ("/health", "/v1/open"):
        assert reached


# Never opened: who has no key is refused, and who needs none is let in, without it.
GUARD: Final = make_guard("sqlite:///never-opened.db")


# A mount is not found by a path with a line feed: nobody gets anywhere with it.
@given(path=PATHS.filter(lambda path: path.startswith("/") and "\n" not in path))
def test_mounting_changes_no_decision(path: str) -> None:
    """A path below a mount is decided like the same path at the top, in every mount."""

    def decide(app: ASGIApp, path: str) -> int:
        return asyncio.run(call(app, http_scope(path=path))).status

    guarded = APIKeyMiddleware(App(), guard=GUARD, exempt=("/health",))
    mounted = Router([Mount("/api", guarded), Mount("/v", guarded), Mount("/v1", guarded)])
    alone = decide(guarded, path)
    for root in ("/api", "/v", "/v1"):
        assert decide(mounted, root + path) == alone


async def test_cors_stands_outside(
    guard: Guard, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Preflights never reach the guard, and its refusals and answers carry the CORS headers."""
    app = App()
    cors = CORSMiddleware(
        APIKeyMiddleware(app, guard=guard), allow_origins=["https://a.example"], allow_methods=["*"]
    )
    origin = (b"origin", b"https://a.example")
    preflight = [origin, (b"access-control-request-method", b"DELETE")]
    with caplog.at_level(logging.DEBUG, "tfm_guard"):
        assert (await call(cors, http_scope("OPTIONS", headers=preflight))).status == 200
        assert caplog.records == []
        for headers, status in ((bearer("x"), 401), ([], 401), (bearer(token), 200)):
            answer = await call(cors, http_scope(headers=[origin, *headers]))
            assert answer.status == status
            assert answer.header("access-control-allow-origin") == "https://a.example"
    assert len(app.scopes) == 1


# WebSockets


class Socket:
    """The server's end of a WebSocket: what it sends to an app, and what the app sends."""

    def __init__(self, first: str = "websocket.connect") -> None:
        self.incoming: list[Message] = [{"type": "websocket.disconnect"}, {"type": first}]
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return self.incoming.pop()

    async def send(self, message: Message) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("headers", [[], bearer("x"), [*bearer("x"), *bearer("x")]])
async def test_a_websocket_is_refused_with_an_answer(
    guard: Guard, headers: list[tuple[bytes, bytes]]
) -> None:
    """Where the server can send one, the answer is the same as to a request."""
    app, socket = App(), Socket()
    guarded = APIKeyMiddleware(app, guard=guard)
    await guarded(websocket_scope(headers, denial=True), socket.receive, socket.send)
    start, body = socket.sent
    assert start["type"] == "websocket.http.response.start"
    assert body["type"] == "websocket.http.response.body"
    answer = Answer(start["status"], tuple(start["headers"]), body["body"])
    assert answer == await call(guarded, http_scope(headers=headers))
    assert app.scopes == []


async def test_a_websocket_is_closed_before_it_is_accepted(guard: Guard) -> None:
    """Where the server can send no answer, the WebSocket is closed with 1008 and nothing else."""
    app, socket = App(), Socket()
    guarded = APIKeyMiddleware(app, guard=guard)
    await guarded(websocket_scope([], denial=False), socket.receive, socket.send)
    assert socket.sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    assert app.scopes == []


@pytest.mark.parametrize("denial", [True, False])
async def test_a_websocket_that_has_gone_gets_nothing(guard: Guard, denial: bool) -> None:  # noqa: FBT001
    """Nothing is sent to a client that was gone before it could be refused."""
    socket = Socket("websocket.disconnect")
    guarded = APIKeyMiddleware(App(), guard=guard)
    await guarded(websocket_scope([], denial=denial), socket.receive, socket.send)
    assert socket.sent == []


async def test_a_websocket_with_a_key_is_the_app_s(guard: Guard, token: str) -> None:
    """With a key nothing is received or sent on the app's behalf."""
    app, socket = App(), Socket()
    guarded = APIKeyMiddleware(app, guard=guard)
    await guarded(websocket_scope(bearer(token), denial=True), socket.receive, socket.send)
    assert [scope["user"].name for scope in app.scopes] == ["CI"]
    assert len(socket.incoming) == 2
    assert socket.sent == []


async def test_websockets_over_a_server(sqlite_url: str) -> None:
    """A real client is told 401 and why, and is let in with a key."""
    async with make_guard(sqlite_url) as guard:
        token = (await guard.keys.create(account_id="acme", name="CI")).token
    server = UvicornProcess(
        "tests.http.guarded_app:served",
        env={"TFM_GUARD_DATABASE_URL": sqlite_url},
        extra_args=("--factory",),
        ready_path="/health",
    )
    with server:
        url = server.url.replace("http", "ws") + "/v1/x"
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(url)
        response = refused.value.response
        assert (response.status_code, response.body) == (401, MISSING_BODY)
        assert response.headers["www-authenticate"] == 'Bearer realm="api"'
        headers = {"Authorization": f"Bearer {token}"}
        async with websockets.connect(url, additional_headers=headers) as connection:
            await connection.wait_closed()
            assert connection.close_code == 1000


# Lifespan


class Lifespan:
    """The server's end of the lifespan of *app*."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()

    async def run(self) -> None:
        """Run the app until its lifespan ends."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        await self._app(scope, self._incoming.get, self._sent.put)

    async def tell(self, event_: str) -> Message:
        """Send *event_* and return what the app answers."""
        self._incoming.put_nowait({"type": event_})
        async with asyncio.timeout(10):
            return await self._sent.get()

    @property
    def silent(self) -> bool:
        """Whether nothing was sent that was not asked for."""
        return self._sent.empty()


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[None]:
    """Start *app* up, and shut it down at the end, both successfully."""
    lifespan = Lifespan(app)
    task = asyncio.create_task(lifespan.run())
    assert await lifespan.tell("lifespan.startup") == {"type": "lifespan.startup.complete"}
    yield
    assert await lifespan.tell("lifespan.shutdown") == {"type": "lifespan.shutdown.complete"}
    await task
    assert lifespan.silent


async def raising(scope: Scope, receive: Receive, send: Send) -> None:
    """Be an app that knows nothing but requests, and says so."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    await PlainTextResponse("here")(scope, receive, send)


async def ignoring(scope: Scope, receive: Receive, send: Send) -> None:
    """Be an app that returns at once from what it does not know."""
    if scope["type"] == "http":
        await PlainTextResponse("here")(scope, receive, send)


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    """Be an app that notices the start, but does not answer."""
    if scope["type"] == "lifespan":
        await receive()
        return
    await PlainTextResponse("here")(scope, receive, send)


def is_open(guard: Guard) -> bool:
    """Tell whether *guard* is open."""
    return repr(guard).endswith("open)")


@pytest.mark.parametrize("app", [raising, ignoring, reading, Starlette(), Router()])
async def test_the_guard_is_open_while_the_server_runs(sqlite_url: str, app: ASGIApp) -> None:
    """Start-up opens the guard and shut-down closes it, whatever the app makes of the lifespan."""
    guard = make_guard(sqlite_url)
    async with running(APIKeyMiddleware(app, guard=guard)):
        assert is_open(guard)
    assert not is_open(guard)


async def test_the_app_s_own_lifespan_runs_inside(sqlite_url: str) -> None:
    """The app starts after the guard has opened, ends before it closes, and keeps its state."""
    guard = make_guard(sqlite_url)
    noted: list[tuple[str, bool]] = []

    @asynccontextmanager
    async def own(_app: Starlette) -> AsyncIterator[dict[str, int]]:
        noted.append(("start", is_open(guard)))
        yield {"answer": 42}
        noted.append(("end", is_open(guard)))

    lifespan = Lifespan(APIKeyMiddleware(Starlette(lifespan=own), guard=guard))
    task = asyncio.create_task(lifespan.run())
    await lifespan.tell("lifespan.startup")
    await lifespan.tell("lifespan.shutdown")
    await task
    assert noted == [("start", True), ("end", True)]
    assert not is_open(guard)


async def test_lifespan_and_middleware_at_once(sqlite_url: str) -> None:
    """An app that opens the guard itself and has the middleware opens and closes it just so."""
    guard = make_guard(sqlite_url)
    middleware = [Middleware(APIKeyMiddleware, guard=guard)]
    app = Starlette(lifespan=guard.lifespan, middleware=middleware)
    for around in (app, APIKeyMiddleware(app, guard=guard)):
        async with running(around):
            created = await guard.keys.create(account_id="acme", name="CI")
            answer = await call(around, http_scope(headers=bearer(created.token)))
            assert answer.status == 404
        assert not is_open(guard)


async def test_a_guard_that_cannot_open_stops_the_start(sqlite_url: str) -> None:
    """With a schema from the future the server is told that the start failed, and why."""
    async with make_guard(sqlite_url):
        pass
    execute(sqlite_url, "UPDATE tfm_schema_version SET version_num = '9999'")
    app = App()
    guard = make_guard(sqlite_url)
    lifespan = Lifespan(APIKeyMiddleware(app, guard=guard))
    task = asyncio.create_task(lifespan.run())
    answer = await lifespan.tell("lifespan.startup")
    await task
    assert answer["type"] == "lifespan.startup.failed"
    assert "revision 9999, newer than this release" in answer["message"]
    assert app.scopes == []
    assert lifespan.silent
    assert not is_open(guard)


async def test_a_database_that_is_not_there_stops_the_start() -> None:
    """Without its database the server is told that the start failed, and what the database said."""
    guard = make_guard("sqlite:////nowhere/keys.db")
    lifespan = Lifespan(APIKeyMiddleware(App(), guard=guard))
    task = asyncio.create_task(lifespan.run())
    answer = await lifespan.tell("lifespan.startup")
    await task
    assert answer["type"] == "lifespan.startup.failed"
    assert "/nowhere/keys.db: No such file or directory" in answer["message"]


async def test_an_app_that_cannot_start_closes_the_guard(sqlite_url: str) -> None:
    """When the app's own start fails, the server is told so and the guard is closed."""

    class Broken:
        async def __aenter__(self) -> None:
            raise RuntimeError("no printer")

        async def __aexit__(self, *_: object) -> None:
            raise AssertionError("it has not started")

    def own(_app: Starlette) -> Broken:
        return Broken()

    guard = make_guard(sqlite_url)
    lifespan = Lifespan(APIKeyMiddleware(Starlette(lifespan=own), guard=guard))
    task = asyncio.create_task(lifespan.run())
    answer = await lifespan.tell("lifespan.startup")
    with pytest.raises(RuntimeError, match="no printer"):
        await task
    assert answer["type"] == "lifespan.startup.failed"
    assert "no printer" in answer["message"]
    assert not is_open(guard)


@pytest.fixture
def openings() -> Iterator[list[str]]:
    """Note each time that a guard reads, on opening, what came with its tables."""
    noted: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM tfm_secrets" in statement:
            noted.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield noted
    event.remove(Engine, "before_cursor_execute", note)


async def test_the_first_requests_open_the_guard_once(sqlite_url: str, openings: list[str]) -> None:
    """Mounted where no lifespan comes, the guard is opened once by many first requests together."""
    async with make_guard(sqlite_url) as other:
        token = (await other.keys.create(account_id="acme", name="CI")).token
    openings.clear()
    guard = make_guard(sqlite_url)
    app = Starlette(routes=[Mount("/api", APIKeyMiddleware(App(), guard=guard))])
    async with running(app):
        opened = [is_open(guard)]
        scopes = [http_scope(path="/api/x", headers=bearer(token)) for _ in range(20)]
        answers = await asyncio.gather(*(call(app, scope) for scope in scopes))
        opened.append(is_open(guard))
    async with guard:
        pass  # and so close it
    assert [answer.status for answer in answers] == [200] * 20
    assert opened == [False, True]
    assert len(openings) == 1
