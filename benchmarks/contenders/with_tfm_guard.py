"""tfm-guard on an SQLite file, with the settings that it comes with."""

import tempfile
from contextlib import AsyncExitStack

from benchmarks.contenders.contender import Contender
from benchmarks.measuring import app
from tfm_guard import APIKeyMiddleware, Guard


async def make() -> Contender:
    """Return the bare app behind the middleware."""
    ending = AsyncExitStack()
    folder = ending.enter_context(tempfile.TemporaryDirectory())
    guard = await ending.enter_async_context(
        Guard.from_urls(database=f"sqlite:///{folder}/keys.db")
    )
    token = (await guard.keys.create(account_id="bench", name="contender")).token
    guarded = APIKeyMiddleware(app, guard=guard)
    return Contender(app, guarded, f"Bearer {token}".encode(), ending)
