"""What many write themselves: Starlette's BaseHTTPMiddleware and a dict of SHA-256 hashes.

No database, no expiry, no counting, and nothing that tells another process of a change.
"""

import hashlib
from contextlib import AsyncExitStack

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from benchmarks.contenders.contender import Contender
from benchmarks.measuring import SOME_TOKEN, app

_ACCOUNTS = {hashlib.sha256(SOME_TOKEN).digest(): "bench"}


class _Keys(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        account = _ACCOUNTS.get(hashlib.sha256(token.encode()).digest())
        if scheme.lower() != "bearer" or account is None:
            return JSONResponse({"detail": "invalid token"}, status_code=401)
        request.state.account = account
        return await call_next(request)


async def make() -> Contender:
    """Return the bare app behind that."""
    return Contender(app, _Keys(app), b"Bearer " + SOME_TOKEN, AsyncExitStack())
