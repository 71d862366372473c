"""The middleware: lets a request through to the app with a valid key, and never without."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from email.utils import format_datetime
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tfm_guard.bearer import Unreadable, read_token
from tfm_guard.errors import (
    ConfigurationError,
    InvalidRequest,
    MissingCredentials,
    Refusal,
    Unavailable,
)
from tfm_guard.guard import Guard
from tfm_guard.http.lifespan import run_lifespan
from tfm_guard.http.live import run_response, run_websocket
from tfm_guard.http.refusals import RefusalResponse, send_refusal
from tfm_guard.live import Ended
from tfm_guard.records import VerifiedKey

_log: Final = logging.getLogger(__name__)

_GUARDED: Final = frozenset({"http", "websocket"})


class APIKeyMiddleware:
    """Pure ASGI middleware that asks for an API key on every request and WebSocket.

    *exempt* lists paths that need no key, each compared exactly with the path that the app's own
    router sees (that is, without the prefix under which the app is mounted). The key is found in
    `scope["user"]`, its scopes in `scope["auth"]`. Refusals are sent, never raised.

    A WebSocket is closed with 1008 before revoking its key returns. With *end_responses*, responses
    under way are broken off, too: for apps that stream them for long.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        guard: Guard,
        exempt: Iterable[str] = (),
        end_responses: bool = False,
    ) -> None:
        if isinstance(exempt, str):
            raise ConfigurationError(f'exempt is a list of paths: exempt=("{exempt}",)')
        self.app = app
        self._guard = guard
        self._exempt = frozenset(exempt)
        self._live = frozenset({"http", "websocket"} if end_responses else {"websocket"})
        faults = [
            f"exempt: {path!r} must begin with /"
            for path in self._exempt
            if not path.startswith("/")
        ]
        if faults:
            raise ConfigurationError(*faults)

    def __repr__(self) -> str:
        return f"APIKeyMiddleware({self.app!r}, exempt={sorted(self._exempt)})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in _GUARDED:
            await self._pass_on(scope, receive, send)
            return
        path = route_path(scope) if scope.get("root_path") else scope["path"]
        if path not in self._exempt:
            try:
                key = self._guard.recall(scope["headers"]) or await self._verify(scope)
            except Refusal as refusal:
                await self._refuse(refusal, scope, receive, send)
                return
            scope["user"] = key
            scope["auth"] = credentials = key.credentials
            if credentials.replaced and kind == "http":
                send = _announcing_its_end(key, send)
            if kind in self._live:
                await self._run_live(key, scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _run_live(self, key: VerifiedKey, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app for as long as *key* holds."""
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self._guard.watch(key))
                # It is watched from here on, and so must hold from here on.
                await connection.check()
            except Unavailable as refusal:  # the guard was closed meanwhile
                await self._refuse(refusal, scope, receive, send)
                return
            except Ended as ended:
                await self._refuse(ended.refusal, scope, receive, send)
                return
            run = run_websocket if scope["type"] == "websocket" else run_response
            realm = self._guard.settings.realm
            await run(self.app, connection, scope, receive, send, realm=realm)

    async def _refuse(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        _log.info("refused: %s", refusal.reason)
        response = RefusalResponse(refusal, self._guard.settings.realm)
        await send_refusal(scope, receive, send, response)

    async def _verify(self, scope: Scope) -> VerifiedKey:
        token = read_token(scope["headers"])
        if token is Unreadable.MALFORMED:
            raise InvalidRequest
        if isinstance(token, Unreadable):
            raise MissingCredentials(reason=token.value)
        return await self._guard.verify(token)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            raise ValueError(f"cannot guard a connection of type {scope['type']!r}")
        await run_lifespan(self.app, self._guard, scope, receive, send)


def _announcing_its_end(key: VerifiedKey, send: Send) -> Send:
    """Have the response say since when *key* is replaced, and when it ends (RFC 9745, RFC 8594)."""
    assert key.replaced_at is not None  # noqa: S101  # it is replaced
    assert key.expires_at is not None  # noqa: S101  # so it has a grace, which ends
    headers = [
        (b"deprecation", b"@%d" % key.replaced_at.timestamp()),
        (b"sunset", format_datetime(key.expires_at, usegmt=True).encode()),
    ]

    async def announce(message: Message) -> None:
        if message["type"] == "http.response.start":
            said = [*message.get("headers", ())]
            # What the app says of these itself stands: neither may be there twice.
            names = {name.lower() for name, _ in said}
            added = [header for header in headers if header[0] not in names]
            message = {**message, "headers": said + added}
        await send(message)

    return announce


def route_path(scope: Scope) -> str:
    """Return the path as Starlette's router sees it: without the mount it is under, if any.

    Never from the URL, whose host part a client can make to contain a path.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path
