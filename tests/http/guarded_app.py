"""The protected app of these tests: it counts how often it was reached."""

from typing import Any

from sqlalchemy import Engine, event
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from tfm_guard import APIKeyMiddleware, Guard, requires

EXEMPT = ("/health", "/observed")


class Observed:
    """What happened so far: *calls* of the protected app, *queries* for keys in the database.

    Others that the guard makes are not for any request: it reads the feed, and notes how far.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.queries = 0
        event.listen(Engine, "before_cursor_execute", self._count_query)

    def stop(self) -> None:
        """Count no more queries."""
        event.remove(Engine, "before_cursor_execute", self._count_query)

    def _count_query(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self.queries += "FROM tfm_keys" in statement


def make_app(guard: Guard, observed: Observed) -> APIKeyMiddleware:
    """Return an app that answers on every path, `/scoped` only for keys that may send."""

    async def anything(scope: Scope, receive: Receive, send: Send) -> None:
        observed.calls += 1
        if scope["type"] == "websocket":
            websocket = WebSocket(scope, receive, send)
            await websocket.accept()
            await websocket.close()
            return
        await PlainTextResponse(scope["user"].key_prefix)(scope, receive, send)

    @requires("send")
    async def scoped(request: Request) -> Response:
        observed.calls += 1
        return PlainTextResponse(request.user.key_prefix)

    async def health(_request: Request) -> Response:
        observed.calls += 1
        return PlainTextResponse("healthy")

    async def tell(_request: Request) -> Response:
        return JSONResponse([observed.calls, observed.queries])

    routes = [
        Route("/health", health),
        Route("/observed", tell),
        Route("/scoped", scoped),
        Mount("/", anything),
    ]
    return APIKeyMiddleware(Starlette(routes=routes), guard=guard, exempt=EXEMPT)


def served() -> APIKeyMiddleware:
    """Return the app for uvicorn, on the database that the environment names."""
    return make_app(Guard.from_environment(), Observed())
