"""Ending what goes on for long when its key is revoked: WebSockets; responses, if asked to."""

import asyncio
import contextlib
import logging
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tfm_guard.errors import Refusal
from tfm_guard.http.refusals import POLICY_VIOLATION, RefusalResponse, deny, send_refusal
from tfm_guard.live import Ended, LiveConnection

_log: Final = logging.getLogger(__name__)

# IANA's registry for RFC 6455: the service cannot do it now; connecting again may help.
_TRY_AGAIN_LATER: Final = 1013
# How long a server may take to close a WebSocket that the app has already left.
_CLOSING_SECONDS: Final = 5.0


async def run_websocket(
    app: ASGIApp,
    connection: LiveConnection,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    realm: str,
) -> None:
    """Run *app*, and close its WebSocket with 1008 in the step in which *connection* ends."""
    socket = _Socket(connection, scope, receive, send, realm)
    connection.on_end = socket.close_soon
    try:
        with contextlib.suppress(Ended):  # as a server does with its own error for it
            await app(scope, socket.receive, socket.send)
    finally:
        await socket.closed()


class _Socket:
    """A WebSocket as the app sees it: disconnected once the key holds no more."""

    def __init__(
        self, connection: LiveConnection, scope: Scope, receive: Receive, send: Send, realm: str
    ) -> None:
        self._connection = connection
        self._scope = scope
        self._receive = receive
        self._send = send
        self._realm = realm
        self._accepted = False
        self._over = False  # there is nothing left to close
        self._unread: list[Message] = []
        self._closing: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        try:
            message = self._unread.pop() if self._unread else await self._next_message()
            if message["type"] == "websocket.disconnect":
                self._over = True
                return message
            try:
                await self._connection.check()
            except asyncio.CancelledError:
                self._unread.append(message)
                raise
        except Ended as ended:
            code = _close_code(ended.refusal)
            return {"type": "websocket.disconnect", "code": code, "reason": ""}
        return message

    async def _next_message(self) -> Message:
        async with self._connection.until_end():
            return await self._receive()

    async def send(self, message: Message) -> None:
        await self._connection.check()
        if message["type"] == "websocket.accept":
            self._accepted = True
        else:
            # It is over with the app's own close, and with a response in place of a WebSocket.
            self._over = self._over or message["type"] != "websocket.send"
        async with self._connection.until_end():  # the client may be slow to take it
            await self._send(message)

    def close_soon(self, refusal: Refusal) -> None:
        """Begin to close the WebSocket, unless there is nothing to close any more.

        The server is told when the event loop comes to what was next in turn in this moment: before
        anybody can be told that the key is refused here.
        """
        if not self._over:
            self._closing = asyncio.get_running_loop().create_task(self._close(refusal))

    async def closed(self) -> None:
        """Return when the WebSocket that had to be closed is so, as far as the server goes."""
        if self._closing is not None:
            try:
                await asyncio.wait({self._closing}, timeout=_CLOSING_SECONDS)
            finally:
                self._closing.cancel()

    async def _close(self, refusal: Refusal) -> None:
        _log.info("a WebSocket was closed: %s", refusal.reason)
        try:
            if self._accepted:
                message = {"type": "websocket.close", "code": _close_code(refusal), "reason": ""}
                await self._send(message)
            else:
                answer = RefusalResponse(refusal, self._realm)
                await deny(self._scope, self._receive, self._send, answer)
        except Exception:  # noqa: BLE001  # the client may have gone in this moment
            _log.debug("a WebSocket could not be closed", exc_info=True)


def _close_code(refusal: Refusal) -> int:
    return _TRY_AGAIN_LATER if refusal.retryable else POLICY_VIOLATION


async def run_response(
    app: ASGIApp,
    connection: LiveConnection,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    realm: str,
) -> None:
    """Run *app*, and break its response off as soon as *connection* ends.

    One that has not begun becomes a refusal; of one that has, the server shows the client that the
    rest is missing.
    """
    response = _Response(connection, send)
    try:
        async with connection.until_end():
            await app(scope, receive, response.send)
    except Exception:
        if connection.refusal is None:
            raise
        # Whatever became of it on the way through the app: this is what it comes from.
        _log.debug("the app did not take the end of its response", exc_info=True)
    if connection.refusal is not None:
        _log.info("a response was broken off: %s", connection.refusal.reason)
        if not response.begun:
            answer = RefusalResponse(connection.refusal, realm)
            await send_refusal(scope, receive, send, answer)


class _Response:
    """A response under way, of which nothing more is sent once the key holds no more."""

    def __init__(self, connection: LiveConnection, send: Send) -> None:
        self.begun = False
        self._connection = connection
        self._send = send

    async def send(self, message: Message) -> None:
        await self._connection.check()
        if message["type"] == "http.response.start":
            self.begun = True
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._connection.release()
