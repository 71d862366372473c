"""Ending what goes on for long when its key is revoked: WebSockets; responses, if asked to."""

import asyncio
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tfm_guard.errors import InvalidToken, Refusal, Unavailable
from tfm_guard.http.refusals import POLICY_VIOLATION, RefusalResponse, send_refusal
from tfm_guard.live import LiveConnection

# RFC 6455's registry: the service cannot do it now; connecting again may help.
_TRY_AGAIN_LATER: Final = 1013


class Ended(OSError):
    """Nothing can be sent any more: the key was revoked. ASGI's own kind of error for that."""

    def __init__(self) -> None:
        super().__init__("the connection was closed, because its API key is not valid any more")


async def run_websocket(
    app: ASGIApp, connection: LiveConnection, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run *app*, and close its WebSocket with 1008 as soon as *connection* ends."""
    socket = _Socket(connection, receive, send)
    closing = asyncio.get_running_loop().create_task(socket.close_when_ended())
    try:
        await app(scope, socket.receive, socket.send)
    finally:
        closing.cancel()
        socket.leave()


class _Socket:
    """A WebSocket as the app sees it: disconnected once the key holds no more."""

    def __init__(self, connection: LiveConnection, receive: Receive, send: Send) -> None:
        self._connection = connection
        self._receive = receive
        self._send = send
        self._code = POLICY_VIOLATION
        self._closed = False
        self._next: asyncio.Task[Message] | None = None
        self._end = asyncio.get_running_loop().create_task(connection.ended.wait())

    def leave(self) -> None:
        """Leave off waiting."""
        self._end.cancel()
        if self._next is not None:
            self._next.cancel()

    async def close_when_ended(self) -> None:
        """Close the WebSocket when its key holds no more, unless it is closed by then."""
        await self._end
        if not self._closed:
            self._closed = True
            await self._send({"type": "websocket.close", "code": self._code, "reason": ""})

    async def receive(self) -> Message:
        if self._next is None:
            # A task, kept until it is done: cancelling it might lose a message.
            self._next = asyncio.ensure_future(self._receive())
        await asyncio.wait({self._next, self._end}, return_when=asyncio.FIRST_COMPLETED)
        if not self._connection.ended.is_set():
            message, self._next = self._next.result(), None
            if message["type"] == "websocket.disconnect":
                self._closed = True
                return message
            if await self._passes():
                return message
        return {"type": "websocket.disconnect", "code": self._code, "reason": ""}

    async def send(self, message: Message) -> None:
        if not await self._passes():
            raise Ended
        if message["type"] == "websocket.close":
            self._closed = True
        await self._send(message)

    async def _passes(self) -> bool:
        try:
            return await self._connection.passes()
        except Unavailable:
            self._code = _TRY_AGAIN_LATER
            self._connection.ended.set()
            return False


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
        async with asyncio.timeout(None) as limit:
            end = asyncio.get_running_loop().create_task(connection.ended.wait())
            end.add_done_callback(lambda _: None if end.cancelled() else limit.reschedule(0))
            try:
                await app(scope, receive, response.send)
            finally:
                end.cancel()
    except Exception:
        # Whatever became of it on the way through the app: this is what it comes from.
        if not connection.ended.is_set():
            raise
    if connection.ended.is_set() and not response.begun:
        await send_refusal(scope, receive, send, RefusalResponse(response.refusal, realm))


class _Response:
    """A response under way, of which nothing more is sent once the key holds no more."""

    def __init__(self, connection: LiveConnection, send: Send) -> None:
        self.begun = False
        self.refusal: Refusal = InvalidToken("revoked meanwhile")
        self._connection = connection
        self._send = send

    async def send(self, message: Message) -> None:
        try:
            passes = await self._connection.passes()
        except Unavailable as error:
            self.refusal = error
            self._connection.ended.set()
            passes = False
        if not passes:
            raise Ended
        self.begun = True
        await self._send(message)
