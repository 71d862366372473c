"""The apps that are served and loaded, bare and behind the middleware.

The guard is set up by the environment alone, as each app runs in a process of its own.
"""

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks.measuring import Receive, Scope, Send, app
from tfm_guard import APIKeyMiddleware, Guard

__all__ = ["bare", "guarded", "guarded_route", "route"]


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as the cheapest app there is; have no lifespan."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    await app(scope, receive, send)


async def _emails(_request: Request) -> JSONResponse:
    """Answer as an API does."""
    return JSONResponse({"items": [], "total": 0})


route = Starlette(routes=[Route("/v1/emails/", _emails)])
# The bare apps are served without a database.
_guard = Guard.from_urls(database=os.environ.get("TFM_GUARD_DATABASE_URL", "sqlite:///unused.db"))
guarded = APIKeyMiddleware(bare, guard=_guard)
guarded_route = APIKeyMiddleware(route, guard=_guard)
