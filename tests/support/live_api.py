"""An app whose connections stay; set up by the environment alone.

What it sends ends with the monotonic time of the machine at which it was sent.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from tfm_guard import APIKeyMiddleware, Guard
from tfm_guard.testing import CHEAP_HASHING

guard = Guard.from_environment(**CHEAP_HASHING, plans={"free": 1000})

_TICK_SECONDS = 0.01


def _stamped(content: str) -> str:
    return f"{content} {time.monotonic()}"


async def _echo(websocket: WebSocket) -> None:
    """Say which process this is, then what is heard."""
    await websocket.accept()
    await websocket.send_text(_stamped(str(os.getpid())))
    async for message in websocket.iter_text():
        await websocket.send_text(_stamped(message))


async def _push(websocket: WebSocket) -> None:
    """Send, and listen to nobody."""
    await websocket.accept()
    async for tick in _ticks():
        await websocket.send_text(tick)


async def _ticks() -> AsyncIterator[str]:
    while True:
        yield _stamped("tick") + "\n"
        await asyncio.sleep(_TICK_SECONDS)


async def _stream(_: Request) -> Response:
    return StreamingResponse(_ticks())


async def _asking(request: Request) -> Response:
    """Stream for as long as the key holds."""

    async def ticks() -> AsyncIterator[str]:
        async for tick in _ticks():
            if not await guard.holds(request.user):
                break
            yield tick
        yield _stamped("over") + "\n"

    return StreamingResponse(ticks())


async def _health(_: Request) -> Response:
    return Response()


_ended = APIKeyMiddleware(
    Starlette(routes=[Route("/stream", _stream)]), guard=guard, end_responses=True
)
_routes = [
    Route("/healthz", _health),
    Route("/stream", _stream),
    Route("/asking", _asking),
    WebSocketRoute("/echo", _echo),
    WebSocketRoute("/push", _push),
]
app = Starlette(
    routes=[
        Route("/v1/api-keys/{rest:path}", guard.management_app()),
        Mount("/ended", _ended),
        Mount("/", APIKeyMiddleware(Starlette(routes=_routes), guard=guard, exempt=("/healthz",))),
    ],
    lifespan=guard.lifespan,
)
