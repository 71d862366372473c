"""A small protected app that tells which process answers; set up by the environment alone."""

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from tfm_guard import APIKeyMiddleware, Guard
from tfm_guard.testing import CHEAP_HASHING

guard = Guard.from_environment(**CHEAP_HASHING, plans={"free": 1000})


async def _whoami(request: Request) -> Response:
    """Say who asks and who answers."""
    return JSONResponse({"name": request.user.display_name, "pid": os.getpid()})


async def _health(_: Request) -> Response:
    return Response()


_inner = APIKeyMiddleware(
    Starlette(routes=[Route("/whoami", _whoami), Route("/healthz", _health)]),
    guard=guard,
    exempt=("/healthz",),
)
app = Starlette(
    routes=[Route("/v1/api-keys/{rest:path}", guard.management_app()), Mount("/", _inner)],
    lifespan=guard.lifespan,
)
