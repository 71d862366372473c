"""The server's end of connections that stay, for apps that are called directly."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tfm_guard import Guard
from tfm_guard.live import LiveConnections

CONNECT: Message = {"type": "websocket.connect"}
ACCEPT: Message = {"type": "websocket.accept"}


def text(content: str) -> Message:
    """Return what a server makes of a client's message."""
    return {"type": "websocket.receive", "text": content}


def say(content: str) -> Message:
    """Return what an app sends to its client."""
    return {"type": "websocket.send", "text": content}


def closed(code: int = 1008) -> Message:
    """Return what closes a WebSocket."""
    return {"type": "websocket.close", "code": code, "reason": ""}


def disconnected(code: int = 1008) -> Message:
    """Return what an app is told when its WebSocket was closed."""
    return {"type": "websocket.disconnect", "code": code, "reason": ""}


def live_of(guard: Guard) -> LiveConnections:
    """Return the live connections of an open guard."""
    assert guard._parts is not None  # noqa: SLF001  # nothing else leads inside
    return guard._parts.live  # noqa: SLF001


class Peer:
    """A client and its server: what comes to the app is put in *incoming*, what it sends in *sent*.

    While *slow*, the server takes nothing: the client does not read.
    """

    def __init__(self, *incoming: Message) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        for message in incoming:
            self.incoming.put_nowait(message)
        self.sent: list[Message] = []
        self._takes = asyncio.Event()
        self._takes.set()
        self._changed = asyncio.Condition()

    async def receive(self) -> Message:
        """Give the app what is next."""
        return await self.incoming.get()

    async def send(self, message: Message) -> None:
        """Take what the app sends."""
        await self._takes.wait()
        async with self._changed:
            self.sent.append(message)
            self._changed.notify_all()

    async def sends(self, *messages: Message) -> None:
        """Return once exactly these were sent."""
        await self.has_sent(len(messages))
        assert self.sent == list(messages)

    async def has_sent(self, count: int) -> None:
        """Return once that many messages were sent."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: len(self.sent) >= count)

    @property
    def slow(self) -> bool:
        """Whether nothing is taken now."""
        return not self._takes.is_set()

    @slow.setter
    def slow(self, value: bool) -> None:
        (self._takes.clear if value else self._takes.set)()

    @asynccontextmanager
    async def runs(self, app: ASGIApp, scope: Scope) -> AsyncIterator["asyncio.Task[None]"]:
        """Run *app*, for a block of at most 10 s; at the end it is cancelled, if it still runs."""
        task = asyncio.get_running_loop().create_task(_run(app, scope, self.receive, self.send))
        try:
            async with asyncio.timeout(10):
                yield task
        finally:
            while not task.done():  # some go on after they were cancelled
                task.cancel()
                await asyncio.wait({task}, timeout=1)


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


class Echo:
    """An app that accepts, says again what it hears, and notes all that it is given."""

    def __init__(self) -> None:
        self.heard: list[Message] = []

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self.heard.append(await receive())
        await send(ACCEPT)
        while True:
            self.heard.append(await receive())
            if self.heard[-1]["type"] == "websocket.disconnect":
                return
            await send(say(self.heard[-1]["text"]))


async def turns(condition: Callable[[], Any]) -> None:
    """Let the event loop turn until *condition*, which nothing outside it decides, holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise TimeoutError("it did not come to that")
